"""Hooks resolve, keep the right outputs, forget them, and see nothing change in place."""

import copy
import gc
import weakref

import kd_detectors
import kd_models
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd import ConfigError, TapSpec, register_detector
from projects.kd.detectors import architectures_with, class_key, tapped_module, taps_for
from projects.kd.taps import FeatureTaps

ARCHS = ("RetinaNet", "GeneralizedRCNN")


class Toy(nn.Module):
    """Two layers, the second one called three times."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.body = nn.ModuleDict({"layer": nn.Linear(2, 2)})

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.body["layer"](x)
        return x


def test_first_call_every_call_and_select():
    toy = Toy()
    taps = FeatureTaps(
        toy,
        {
            "first": TapSpec("body.layer"),
            "all": TapSpec("body.layer", every_call=True),
            "norm": TapSpec("stem", select=lambda output: output.norm()),
        },
    )
    x = torch.randn(1, 2)
    with taps.record():
        result = toy(x)
    stem = toy.stem(x)
    torch.testing.assert_close(taps["first"], toy.body["layer"](stem))
    assert len(taps["all"]) == 3
    assert taps["all"][-1] is result, "a tap must not copy"
    torch.testing.assert_close(taps["norm"], stem.norm())


def test_paths_are_tried_in_order():
    taps = FeatureTaps(Toy(), {"layer": TapSpec(("nowhere", "body.layer", "stem"))})
    assert taps.paths == {"layer": "body.layer"}


def test_unknown_path_names_the_nearest_modules():
    with pytest.raises(ConfigError) as error:
        FeatureTaps(Toy(), {"features": TapSpec("body.laier")})
    message = str(error.value)
    assert "'features'" in message and "'body.laier'" in message and "Toy" in message
    assert message.index("body.layer") < message.index("stem"), "nearest first"
    assert "\n" not in message


def test_values_exist_only_between_record_and_clear():
    toy = Toy()
    taps = FeatureTaps(toy, {"stem": TapSpec("stem")})
    toy(torch.randn(1, 2))
    assert "stem" not in taps, "recorded outside of record()"
    with taps.record():
        toy(torch.randn(1, 2))
    kept = weakref.ref(taps["stem"])
    toy(torch.randn(1, 2))
    assert taps["stem"] is kept(), "a later pass replaced what the step recorded"
    taps.clear()
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="'stem'.*did not run"):
        taps["stem"]


def test_after_an_exception_the_next_step_starts_empty():
    toy = Toy()
    taps = FeatureTaps(toy, {"stem": TapSpec("stem")})
    with pytest.raises(ZeroDivisionError), taps.record():
        stale = toy.stem(torch.randn(1, 2))
        raise ZeroDivisionError
    toy(torch.randn(1, 2))
    assert taps["stem"] is stale, "still recording"
    with taps.record():
        fresh = toy.stem(torch.randn(1, 2))
    assert taps["stem"] is fresh


def test_remove_takes_the_hooks_off():
    toy = Toy()
    taps = FeatureTaps(toy, {"stem": TapSpec("stem")})
    taps.remove()
    assert not toy.stem._forward_hooks


def test_a_copy_has_taps_of_its_own():
    toy = Toy()
    holder = nn.ModuleDict({"toy": toy})
    holder.taps = FeatureTaps(toy, {"stem": TapSpec("stem")})
    twin = copy.deepcopy(holder)
    with twin.taps.record():
        twin["toy"](torch.randn(1, 2))
    assert "stem" in twin.taps and "stem" not in holder.taps


def test_subclasses_inherit_and_extend_taps():
    class TapBase(nn.Module):
        pass

    class TapDerived(TapBase):
        pass

    register_detector("TapBase", taps={"features": TapSpec("backbone"), "other": TapSpec("a")})
    register_detector("TapDerived", taps={"other": TapSpec("b")})
    assert {name: spec.path for name, spec in taps_for(TapBase()).items()} == {
        "features": "backbone",
        "other": "a",
    }
    assert taps_for(TapDerived)["other"].path == "b"
    assert taps_for(TapDerived)["features"].path == "backbone"
    assert {"TapBase"} <= set(architectures_with(["features", "other"]))
    assert "TapDerived" not in architectures_with(["features", "other"])


def test_an_unregistered_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"META_ARCHITECTURE Toy .*GeneralizedRCNN"):
        taps_for(Toy())


def test_the_module_behind_a_tap():
    model = kd_models.build(kd_models.tiny_cfg())
    assert tapped_module(model, "bottom_up") is model.backbone.bottom_up
    with pytest.raises(ConfigError, match=r"RetinaNet registered no tap 'masks'; .*bottom_up"):
        tapped_module(model, "masks")
    model.backbone = model.backbone.bottom_up
    with pytest.raises(ConfigError, match=r"tap 'bottom_up': RetinaNet has no module"):
        tapped_module(model, "bottom_up")


def test_class_keys_of_detectron2():
    assert class_key("RetinaNet") == "MODEL.RETINANET.NUM_CLASSES"
    assert class_key("GeneralizedRCNN") == "MODEL.ROI_HEADS.NUM_CLASSES"
    assert class_key("Toy") is None


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Boxes):
        yield value.tensor
    elif isinstance(value, Instances):
        yield from _tensors(value.get_fields())
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_registered_tap_is_changed_in_place(arch):
    # with all the branches that a registered tap belongs to
    rcnn = arch == "GeneralizedRCNN"
    cfg = kd_detectors.every_branch_cfg() if rcnn else kd_models.tiny_cfg(arch)
    model = kd_models.build(cfg).train()
    captured: list[tuple[str, torch.Tensor, int]] = []
    ran = set()

    def spy(name, spec):
        def select(output):
            value = output if spec.select is None else spec.select(output)
            ran.add(name)
            captured.extend((name, tensor, tensor._version) for tensor in _tensors(value))
            return value

        return TapSpec(spec.path, select=select, every_call=spec.every_call)

    specs = taps_for(model)
    taps = FeatureTaps(model, {name: spy(name, spec) for name, spec in specs.items()})
    with EventStorage(0), taps.record():
        losses = model(kd_detectors.full_batch() if rcnn else kd_models.make_batch())
    sum(losses.values()).backward()
    assert ran == set(specs), "a registered tap did not run"
    changed = sorted({name for name, tensor, version in captured if tensor._version != version})
    assert not changed


def test_dense_tap_runs_on_a_teacher_of_which_only_the_backbone_runs():
    model = kd_models.build(kd_models.tiny_cfg()).eval()
    spec = taps_for(model)["dense"]
    taps = FeatureTaps(model, {"dense": spec})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), taps.record():
        features = model.backbone(images)
        assert "dense" not in taps
        spec.run(model, features)
        outputs = taps["dense"]
    assert [tuple(x.shape) for x in outputs.logits] == [
        (2, kd_models.CLASSES, *features[level].shape[-2:]) for level in model.head_in_features
    ]
    assert {x.shape[1] for x in outputs.boxes} == {4}
