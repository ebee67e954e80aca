"""KD.<HEAD>.TARGET may name a map that a user's own detectors registered."""

import kd_models
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from projects.kd import ConfigError, TapSpec, register_detector
from projects.kd.functional.cwd import cwd_loss


class Necked(RetinaNet):
    """A RetinaNet that offers one lateral map by name, and what is no map."""


register_detector(
    "Necked",
    taps={
        "neck": TapSpec("backbone.fpn_lateral4", channels=lambda model: 16),
        "nameless": TapSpec("backbone.fpn_lateral4"),
        "levels": TapSpec("backbone", channels=lambda model: 16),
    },
)


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    META_ARCH_REGISTRY.register(Necked)
    cfg = kd_models.tiny_cfg(MODEL__META_ARCHITECTURE="Necked")
    yield kd_models.write_teacher(tmp_path_factory.mktemp("teacher"), cfg)
    META_ARCH_REGISTRY._obj_map.pop("Necked")


def config(teacher_files, head="CWD", arch="Necked", **node):
    keys = {f"KD__{head}__{key}": value for key, value in node.items()}
    return kd_models.distill_cfg(
        teacher_files, heads=(head,), MODEL__META_ARCHITECTURE=arch, **keys
    )


def test_a_registered_map_is_compared(teacher_files):
    cfg = config(teacher_files, TARGET="neck", TAU=2.0, WEIGHT=3.0, MASK_PADDING=False)
    cfg.KD.ADAPTER.TYPE = "conv1x1"
    wrapper = kd_models.build_wrapper(cfg)
    adapter = wrapper.heads["CWD"].adapters["neck"]
    assert (adapter.in_channels, adapter.out_channels) == (16, 16)
    batch = kd_models.make_batch()
    with kd_models.EventStorage(0):
        ctx, _ = wrapper.observe(batch)
        found = wrapper.imitate(ctx)["loss_kd_cwd"]
    student, teacher = (x["neck"] for x in (ctx.student_outputs, ctx.teacher_outputs))
    assert student.shape == teacher.shape == (2, 16, 6, 6) and not teacher.requires_grad
    torch.testing.assert_close(found, 3.0 * cwd_loss(adapter(student), teacher, 2.0))


@pytest.mark.parametrize(
    ("head", "arch", "target", "message"),
    [
        ("CWD", "RetinaNet", "neck", r"KD\.CWD\.TARGET: 'neck' is not one of features, dense"),
        ("CWD", "Necked", "nameless", r"KD\.CWD\.TARGET: 'nameless' is not one of"),
        ("MGD", "Necked", "neck", r"KD\.MGD\.TARGET: 'neck' is not one of features, decoder"),
    ],
)
def test_what_is_no_common_map_is_refused(teacher_files, head, arch, target, message):
    with pytest.raises(ConfigError, match=message):
        kd_models.build_wrapper(config(teacher_files, head, arch, TARGET=target))


def test_a_tap_that_gives_no_map_is_said_in_the_first_step(teacher_files):
    wrapper = kd_models.build_wrapper(config(teacher_files, "AT", TARGET="levels"))
    with pytest.raises(ConfigError, match=r"KD\.AT\.TARGET: 'levels' of the student is no map"):
        kd_models.losses_at(wrapper, kd_models.make_batch())
