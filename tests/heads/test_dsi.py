"""DSI keeps to the contract; which maps it aligns, and what it refuses."""

import kd_models
import pytest
import torch
from head_contract import HeadContract
from kd_testing import CHANNELS, ToyDetector, head_cfg, make_context, stage, toy_info
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.functional.dsi import cosine_loss
from projects.kd.heads import build_imitation_heads
from projects.kd.heads.dsi import DSI


class TestDSI(HeadContract):
    name = "DSI"
    equal_node = {"ADAPTER": "none"}

    def test_without_mask_padding_padded_cells_take_part(self):
        self.node = {"LEVELS": ("p3", "p4", "p5")}  # p5 alone has no cell of padding there
        super().test_without_mask_padding_padded_cells_take_part()


def build(student=CHANNELS, teacher=CHANNELS + 2, **node) -> DSI:
    infos = [x if not isinstance(x, int) else toy_info(x) for x in (student, teacher)]
    return build_imitation_heads(head_cfg("DSI", **node), *infos)["DSI"]


def test_the_coarsest_level_of_stride_32_by_default_through_a_linear_layer():
    head = build(teacher=CHANNELS)
    assert head.levels == ("p5",)
    (adapter,) = head.adapters.values()
    assert isinstance(adapter, nn.Conv2d) and adapter.kernel_size == (1, 1), "also of equal widths"
    fine = build(LEVELS=("p3", "p4"), WEIGHT=3.0, MASK_PADDING=False)
    ctx = make_context(channels=(CHANNELS, CHANNELS + 2))
    losses = [
        cosine_loss(fine.adapters[x](ctx.student_features[x]), ctx.teacher_features[x].detach())
        for x in ("p3", "p4")
    ]
    torch.testing.assert_close(fine(ctx)["loss_kd_dsi"], 3 * sum(losses) / 2)


def test_levels_beyond_stride_32_are_not_taken_by_themselves():
    strides = {"p4": 16, "p5": 32, "p6": 64}
    info = toy_info(model=ToyDetector(strides=strides))
    assert build(info, info).levels == ("p5",)
    info = toy_info(model=ToyDetector(strides={"p6": 64, "p7": 128}))
    assert build(info, info).levels == ("p6",)


def test_bottom_up_aligns_the_stage_of_that_stride():
    head = build(TARGET="bottom_up", MASK_PADDING=False)
    assert head.stages == {"p5": stage("p5")} and head.requires_student == {"bottom_up"}
    ctx = make_context(channels=(CHANNELS, CHANNELS + 2))
    own = ctx.student_outputs["bottom_up"][stage("p5")]
    assert len(head.acts_on(ctx)) == 1 and torch.equal(head.acts_on(ctx)[0], own)
    expected = 5 * cosine_loss(head.adapters["p5"](own), ctx.teacher_features["p5"].detach())
    torch.testing.assert_close(head(ctx)["loss_kd_dsi"], expected)


def test_training_step_on_the_last_stage(tmp_path):
    files = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(files, heads=("DSI",), KD__DSI__TARGET="bottom_up")
    model = kd_models.build_wrapper(cfg)
    losses = kd_models.losses_at(model, kd_models.make_batch())
    losses["loss_kd_dsi"].backward()
    reached = {n.split(".")[1] for n, p in model.student.named_parameters() if p.grad is not None}
    assert reached == {"bottom_up"}
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert all(p.grad.any() for p in model.heads.parameters())


def test_what_it_refuses():
    for node, line in (
        ({"TARGET": "dense"}, "KD.DSI.TARGET: 'dense' is not one of features, bottom_up"),
        ({"ADAPTER": "linear"}, "KD.DSI.ADAPTER: 'linear' is not one of"),
        ({"ADAPTER": "none"}, "KD.DSI.ADAPTER: 'none' needs equal channels"),
    ):
        with pytest.raises(ConfigError, match=line):
            build(**node)
    plain = ToyDetector()
    del plain.backbone.bottom_up
    with pytest.raises(ConfigError, match="KD.DSI.TARGET 'bottom_up': ToyDetector has a"):
        build(toy_info(model=plain), TARGET="bottom_up")
    coarse = toy_info(model=ToyDetector(strides={"p5": 32, "p6": 64}))
    coarse.model.backbone.bottom_up.output_shape = lambda: {"res5": coarse.shapes["p5"]}
    with pytest.raises(ConfigError, match="KD.DSI.LEVELS .*no stage of the stride of p6; it has"):
        build(coarse, coarse, TARGET="bottom_up", LEVELS=("p6",))
