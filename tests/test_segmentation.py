"""Segmentation students and teachers: taps, targets, label maps, and what is refused."""

import kd_models
import pytest
import torch
from detectron2.modeling import build_model
from segmentation import NETWORKS, label_batch, segmentor_cfg

from projects.kd import ConfigError, DataError
from projects.kd.detectors import taps_for
from projects.kd.heads.base import head_class
from projects.kd.teacher_building import build_teacher

PAIRS = [
    ("AT", {}),
    ("AT", {"TARGET": "decoder"}),
    ("AT", {"TARGET": "sem_seg"}),
    ("PI", {}),
    ("PI", {"REDUCTION": "elements", "TAU": 2.0}),
    ("LOCAL", {"TARGET": "decoder"}),
    ("LOCAL", {"TARGET": "sem_seg"}),
    ("PA", {"TARGET": "decoder", "POOL": 0.5}),
    ("PA", {"TARGET": "sem_seg"}),
    ("IFVD", {}),
    ("IFVD", {"TARGET": "decoder"}),
    ("CWD", {}),
    ("CWD", {"TARGET": "decoder", "TAU": 4.0}),
    ("CWD", {"TARGET": "sem_seg", "TAU": 4.0}),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Network to (config, weights) of a teacher with other widths than the students."""
    found = {}

    def teacher(network, **overrides):
        key = (network, *overrides.items())
        if key not in found:
            overrides = {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 24, **overrides}
            cfg = segmentor_cfg(network, **overrides)
            found[key] = kd_models.write_teacher(tmp_path_factory.mktemp("teacher"), cfg)
        return found[key]

    return teacher


def student_cfg(teacher, head, node=None, network="pspnet", **overrides):
    values = {
        "KD__META_ARCHITECTURE": "DistillMetaArch",
        "KD__HEADS": (head,),
        "KD__TEACHER__CONFIG_FILE": teacher[0],
        "KD__TEACHER__WEIGHTS": teacher[1],
    }
    values |= {f"KD__{head}__{key}": value for key, value in (node or {}).items()}
    return segmentor_cfg(network, **values, **overrides)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_train_and_predict_at_the_size_of_the_image(network):
    model = kd_models.build(segmentor_cfg(network)).train()
    batch = label_batch()
    losses = kd_models.losses_at(model, batch)
    assert all(loss.isfinite() for loss in losses.values()) and "loss_sem_seg" in losses
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in missing if "top_block" not in n], missing
    with torch.no_grad():
        outputs = model.eval()(label_batch(((60, 90), (33, 47))))
    assert [tuple(x["sem_seg"].shape) for x in outputs] == [(7, 60, 90), (7, 33, 47)]


@pytest.mark.parametrize("network", NETWORKS)
def test_taps_are_the_logits_and_what_the_last_layer_reads(network):
    cfg = segmentor_cfg(network)
    model = kd_models.build(cfg)
    specs = taps_for(model)
    teacher = kd_models_teacher(model)
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)]
    found = teacher.observe(images, (64, 96), "BGR")
    logits, decoder = found["sem_seg"], found["decoder"]
    stride = cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE
    assert logits.shape == (1, 7, 64 // stride, 96 // stride)
    assert decoder.shape == (1, specs["decoder"].channels(model), *logits.shape[2:])
    torch.testing.assert_close(model.sem_seg_head.predictor(decoder), logits)
    with torch.no_grad():
        expected = model([{"image": images[0], "height": 64, "width": 96}])[0]["sem_seg"]
    upsampled = torch.nn.functional.interpolate(logits, scale_factor=stride, mode="bilinear")
    torch.testing.assert_close(upsampled[0], expected)


def kd_models_teacher(model):
    from projects.kd import Teacher

    teacher = Teacher(model, fuse=False)
    teacher.tap({"features", "sem_seg", "decoder"})
    return teacher


def test_two_taps_of_a_head_run_it_once():
    model = kd_models.build(segmentor_cfg())
    teacher = kd_models_teacher(model)
    calls = []
    model.sem_seg_head.bottleneck.register_forward_hook(lambda *_: calls.append(1))
    teacher.observe([torch.zeros(3, 64, 64, dtype=torch.uint8)], (64, 64), "BGR")
    assert len(calls) == 1


@pytest.mark.parametrize(("head", "node"), PAIRS, ids=lambda x: str(x))
def test_each_head_and_target_teaches_a_segmentation_student(teachers, head, node):
    """A teacher of other width; gradients reach what the target says, and no further."""
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), head, node))
    losses = kd_models.losses_at(model, label_batch())
    loss = losses[f"loss_kd_{head.lower()}"]
    assert loss.isfinite() and loss.item() > 0
    loss.backward()
    reached = {
        n for n, p in model.student.named_parameters() if p.grad is not None and p.grad.any()
    }
    target = model.heads[head].target
    assert any(name.startswith("backbone.") for name in reached)
    assert any(name.startswith("sem_seg_head.bottleneck") for name in reached) == (
        target != "features"
    )
    assert any(name.startswith("sem_seg_head.predictor") for name in reached) == (
        target == "sem_seg"
    )
    assert not any(name.startswith("sem_seg_head.auxiliary") for name in reached)
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize(("head", "node"), PAIRS, ids=lambda x: str(x))
def test_student_equal_to_teacher_has_no_loss(tmp_path, head, node):
    """In evaluation mode of norms and without dropout the two sides compute the same."""
    off = {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__SEM_SEG_HEAD__NORM": "GN"}
    off |= {"MODEL__SEM_SEG_HEAD__PSPNET__DROPOUT": 0.0, "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32}
    off |= {"MODEL__SEM_SEG_HEAD__PSPNET__AUX_FEATURE": ""}
    teacher = kd_models.write_teacher(tmp_path, segmentor_cfg("pspnet", **off))
    model = kd_models.build_wrapper(student_cfg(teacher, head, node, **off))
    model.student.load_state_dict(model.teacher.model.state_dict())
    loss = kd_models.losses_at(model, label_batch())[f"loss_kd_{head.lower()}"]
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("head", "node"), PAIRS, ids=lambda x: str(x))
def test_with_mask_padding_a_larger_canvas_changes_nothing(teachers, head, node):
    if node.get("POOL"):
        pytest.skip("blocks are a share of the canvas")
    node = {**node, "MASK_PADDING": True}
    head_model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), head, node))
    imitation = head_model.heads[head].train()
    ctx, _ = observed(head_model, label_batch(((64, 96),) * 2))
    expected = imitation(ctx)
    pad_context(ctx, 32, 64)
    found = imitation(ctx)
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-6)


def observed(model, batch):
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        return model.observe(batch)


def pad_context(ctx, rows, columns):
    """The same batch on a canvas with more rows and columns, filled with noise."""
    old = ctx.canvas
    ctx.canvas = (old[0] + rows, old[1] + columns)
    ctx._masks.clear()
    for maps in (
        ctx.student_features,
        ctx.teacher_features,
        ctx.student_outputs,
        ctx.teacher_outputs,
    ):
        for name, x in maps.items():
            stride = old[0] // x.shape[-2]
            wide = 9 * torch.randn(*x.shape[:2], *(side // stride for side in ctx.canvas))
            wide[..., : x.shape[-2], : x.shape[-1]] = x
            maps[name] = wide


STRIDES = [("pspnet", "fpn"), ("pspnet", "deeplab"), ("deeplab", "pspnet"), ("fpn_timm", "fpn")]


@pytest.mark.parametrize("target", ["sem_seg", "decoder"])
@pytest.mark.parametrize("pair", STRIDES, ids=lambda x: "-".join(x))
def test_other_output_strides_and_networks(teachers, pair, target):
    """The teacher's map is resized to the student's grid, whatever levels the backbones have."""
    student, teacher = pair
    overrides = {"MODEL__FPN__OUT_CHANNELS": 16}
    cfg = student_cfg(teachers(teacher), "CWD", {"TARGET": target}, student, **overrides)
    model = kd_models.build_wrapper(cfg)
    losses = kd_models.losses_at(model, label_batch())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("head", "node"), [PAIRS[1], PAIRS[-1]], ids=lambda x: str(x))
def test_a_teacher_of_double_resolution(teachers, head, node):
    """Its cells in the padding take no part where the map is brought to the student's grid."""
    node = {**node, "MASK_PADDING": True}
    cfg = student_cfg(teachers("fpn"), head, node, "fpn", KD__TEACHER__INPUT_SCALE=2.0)
    model = kd_models.build_wrapper(cfg)
    batch = label_batch()
    for item in batch:  # two rows less: a cell of stride 4 is half inside
        item["image"], item["sem_seg"] = item["image"][:, :-2], item["sem_seg"][:-2]
        item["image_teacher"] = item["image"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    ctx, _ = observed(model, batch)
    name = node["TARGET"]
    theirs = ctx.teacher_outputs[name]
    assert theirs.shape[2] == 2 * ctx.student_outputs[name].shape[2]
    expected = model.heads[head](ctx)
    ctx.teacher_outputs[name] = theirs.masked_fill(~ctx.canvas_mask(theirs.shape[2:]), 1e4)
    for key, loss in model.heads[head](ctx).items():
        assert loss.isfinite() and loss > 0
        torch.testing.assert_close(loss, expected[key])


def test_features_of_dilated_backbones_are_paired_by_name(teachers):
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), "AT"))
    assert model.level_map == {"res4": "res4", "res5": "res5"}


def test_features_without_a_common_level_are_refused(teachers):
    """Output stride 16 against 8: res5 can be paired by KD.LEVEL_MAP."""
    teacher = teachers("pspnet")
    options = {"MODEL__RESNETS__OUTPUT_STRIDE": 16, "MODEL__SEM_SEG_HEAD__COMMON_STRIDE": 16}
    options |= {"MODEL__RESNETS__OUT_FEATURES": ["res5"]}
    options |= {"MODEL__SEM_SEG_HEAD__IN_FEATURES": ["res5"]}
    options |= {"MODEL__SEM_SEG_HEAD__PSPNET__AUX_FEATURE": ""}
    with pytest.raises(
        ConfigError, match=r"share no level; set KD.LEVEL_MAP; student: res5 \(stri"
    ):
        kd_models.build_wrapper(student_cfg(teacher, "AT", **options))
    options["KD__LEVEL_MAP"] = [["res5", "res5"]]
    model = kd_models.build_wrapper(student_cfg(teacher, "AT", **options))
    assert kd_models.losses_at(model, label_batch())["loss_kd_at"].isfinite()


@pytest.mark.parametrize("head", ["CWD", "PI"])
def test_a_teacher_with_other_classes_is_refused_on_logits(teachers, head):
    teacher = teachers("pspnet", MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    with pytest.raises(
        ConfigError, match=f"KD.{head}.TARGET: 'sem_seg'.* student has 7 and the teacher 19"
    ):
        kd_models.build_wrapper(student_cfg(teacher, head, {"TARGET": "sem_seg"}))


@pytest.mark.parametrize(
    ("head", "node"),
    [("CWD", {}), ("CWD", {"TARGET": "decoder"}), ("AT", {"TARGET": "sem_seg"}), ("IFVD", {})],
)
def test_a_teacher_with_other_classes_teaches_what_has_none(teachers, head, node):
    teacher = teachers("pspnet", MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    model = kd_models.build_wrapper(student_cfg(teacher, head, node))
    assert all(x.isfinite() for x in kd_models.losses_at(model, label_batch()).values())


def test_levels_of_a_target_without_levels_are_refused(teachers):
    node = {"TARGET": "decoder", "LEVELS": ("res5",)}
    with pytest.raises(ConfigError, match="KD.CWD.LEVELS: TARGET 'decoder' has no levels"):
        kd_models.build_wrapper(student_cfg(teachers("pspnet"), "CWD", node))


def test_box_labels_are_refused_for_a_student_that_segments_its_decoder(teachers):
    node = {"TARGET": "decoder", "LABELS": "boxes"}
    with pytest.raises(ConfigError, match="KD.IFVD.LABELS"):
        kd_models.build_wrapper(student_cfg(teachers("pspnet"), "IFVD", node))


def test_labels_that_are_all_ignored(teachers):
    """PSPNet's and IFVD's losses are 0, with gradients that DDP can wait for."""
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), "IFVD"))
    batch = label_batch()
    for item in batch:
        item["sem_seg"].fill_(255)
    losses = kd_models.losses_at(model, batch)
    assert all(loss.item() == 0.0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.parameters())


def test_classes_that_never_occur(teachers):
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), "IFVD"))
    losses = kd_models.losses_at(model, label_batch(classes=1))
    assert all(loss.isfinite() for loss in losses.values())


def test_label_maps_are_padded_with_ignore_and_made_once(teachers):
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), "IFVD"))
    batch = label_batch()
    ctx, _ = observed(model, batch)
    labels = ctx.label_maps(255)
    assert labels is ctx.label_maps(255) and labels.shape == (2, 96, 96)
    assert torch.equal(labels[0, :64, :96], batch[0]["sem_seg"])
    assert (labels[0, 64:] == 255).all() and (labels[1, :, 64:] == 255).all()


def test_a_label_map_of_another_size_names_the_file(teachers):
    model = kd_models.build_wrapper(student_cfg(teachers("pspnet"), "IFVD"))
    batch = label_batch()
    ctx, _ = observed(model, batch)
    batch[1]["file_name"] = "b.png"
    batch[1]["sem_seg"] = batch[1]["sem_seg"][:-1]
    with pytest.raises(DataError, match=r"b.png: the label map has \(95, 64\) .* \(96, 64\)"):
        ctx.label_maps(255)
    del batch[1]["sem_seg"]
    with pytest.raises(DataError, match="b.png has no label map"):
        ctx.label_maps(255)


def test_a_detector_that_does_not_segment_is_refused(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(teacher, heads=("PI",))
    with pytest.raises(ConfigError, match="KD.PI.TARGET: 'sem_seg'.*student RetinaNet.*Semantic"):
        kd_models.build_wrapper(cfg)


def test_panoptic_fpn_offers_the_same_taps(tmp_path):
    values = {"MODEL__META_ARCHITECTURE": "PanopticFPN", "MODEL__MASK_ON": True}
    values |= {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 16, "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 7}
    values |= {"MODEL__SEM_SEG_HEAD__NORM": "BN", "MODEL__ROI_MASK_HEAD__NUM_CONV": 1}
    values |= {"MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"}
    cfg = kd_models.tiny_cfg("GeneralizedRCNN", **values)
    model = build_model(cfg)
    assert {"features", "sem_seg", "decoder", "bottom_up"} <= set(taps_for(model))
    found = kd_models_teacher(model).observe([torch.zeros(3, 64, 64)], (64, 64), "BGR")
    assert found["sem_seg"].shape == (1, 7, 16, 16) and found["decoder"].shape == (1, 16, 16, 16)


def test_the_teachers_classes_are_those_of_pixels(teachers):
    cfg = student_cfg(teachers("pspnet"), "AT")
    assert build_teacher(cfg).names["stuff_classes"][0] == "background"


def test_every_target_is_covered_above():
    for name in ("AT", "PI", "LOCAL", "PA", "IFVD", "CWD"):
        covered = {node.get("TARGET") for head, node in PAIRS if head == name}
        assert covered and head_class(name).targets
