"""What every imitation head has to keep to; a head's test file inherits :class:`HeadContract`.

::

    class TestMimic(HeadContract):
        name = "Mimic"

A head that cannot be fed by the toy detectors overrides ``infos`` and ``context``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from kd_testing import CHANNELS, head_cfg, leaves, make_context, toy_info

from projects.kd.heads import build_imitation_heads
from projects.kd.predict import DenseOutputs

MORE_CHANNELS = CHANNELS + 4
RAGGED = {"sizes": ((40, 56), (64, 33)), "canvas": (64, 64)}
SPOILERS = (1e4, float("inf"), float("nan"))


def trained(head):
    """Names and parameters, without those that an average or a frozen copy keeps."""
    return [(name, p) for name, p in head.named_parameters() if p.requires_grad]


class HeadContract:
    """Properties of a head, whatever its mathematics.

    Class attributes to set:
        name: registry name.
        node: keys of KD.<HEAD> for all tests.
        equal_node: further keys with which student and teacher can be compared as they are.
        floor: value of the scheduled losses when student and teacher agree.
        tolerance: how far from the floor rounding may lead.
        adapts: whether the head can bridge different numbers of channels.
        has_adapters: whether it does so by modules (False: its maths has no channels).
        may_skip_levels: a level may have no cell that the head looks at.
        reads: "features" or "dense", what the student's gradient must reach.
        blind_to_canvas: prefix of the losses that do not see how far a batch is padded.
        half: tolerances of a step in half precision.
        averages_teacher: a teacher's grid that is finer is brought to the student's by its mean.
    """

    name: str
    node: dict = {}
    equal_node: dict = {}
    floor: float = 0.0
    tolerance: float = 1e-6
    adapts: bool = True
    has_adapters: bool = True
    may_skip_levels: bool = False
    reads: str = "features"
    blind_to_canvas: str = "loss_"
    half: dict = {"rtol": 1e-5, "atol": 1e-7}
    averages_teacher: bool = True

    # -- what a head with other needs overrides ------------------------------------------------

    def infos(self, channels):
        return tuple(toy_info(number) for number in channels)

    def context(self, **kwargs):
        return make_context(**kwargs)

    def make_equal(self, head) -> None:
        """Set student-side projections to the teacher-side ones; adapters are identities here."""

    def padded(self, ctx):
        """(level, tensor) whose padded cells MASK_PADDING has to keep out."""
        sides = leaves(ctx)
        return [*sides.student, *sides.teacher]

    # -- helpers -------------------------------------------------------------------------------

    def head(self, channels=(CHANNELS, CHANNELS), common=None, **node):
        torch.manual_seed(7)
        cfg = head_cfg(self.name, common, **{**self.node, **node})
        return build_imitation_heads(cfg, *self.infos(channels))[self.name].train()

    @staticmethod
    def run(head, ctx):
        """The losses as the training wrapper asks for them, and their sum."""
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            losses = head(ctx)
        return losses, sum(losses.values())

    def student_leaves(self, ctx, head):
        """What the head reads of the student: (level, tensor) of its levels."""
        found = leaves(ctx).student
        count = len(ctx.student_features)
        part = found[:count] if self.reads == "features" else found[count:]
        return [(level, x) for level, x in part if level in head.levels]

    # -- the contract --------------------------------------------------------------------------

    def test_losses_are_named_scalars_in_fp32_and_obey_the_weight(self):
        losses, _ = self.run(self.head(), self.context(**RAGGED))
        prefix = f"_{self.name.lower()}"
        for key, loss in losses.items():
            assert key.startswith(("loss_kd" + prefix, "loss_aux" + prefix))
            assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
            assert loss.requires_grad
        scheduled = [key for key in losses if key.startswith("loss_kd")]
        assert scheduled and all(losses[key].item() > 0 for key in scheduled)
        weight = self.head().weight
        doubled, _ = self.run(self.head(WEIGHT=2 * weight), self.context(**RAGGED))
        for key in scheduled:
            torch.testing.assert_close(doubled[key], 2 * losses[key])

    def test_floor_when_student_equals_teacher(self):
        head = self.head(**self.equal_node)
        self.make_equal(head)
        losses, _ = self.run(head, self.context(**RAGGED, same=True))
        for key, loss in losses.items():
            if key.startswith("loss_kd"):
                assert loss.item() == pytest.approx(self.floor, abs=self.tolerance)
        different, _ = self.run(head, self.context(**RAGGED))
        assert all(v > self.floor + 1e-4 for k, v in different.items() if k.startswith("loss_kd"))

    @pytest.mark.parametrize("teacher_channels", [CHANNELS, MORE_CHANNELS])
    def test_gradient_reaches_student_and_adapters_never_the_teacher(self, teacher_channels):
        if teacher_channels != CHANNELS and not self.adapts:
            pytest.skip("the head has no adapters; a test of its own covers what it says")
        channels = (CHANNELS, teacher_channels)
        head = self.head(channels)
        ctx = self.context(**RAGGED, channels=channels)
        losses, total = self.run(head, ctx)
        total.backward()
        reached = []
        for level, x in self.student_leaves(ctx, head):
            assert x.grad is not None and x.grad.isfinite().all(), level
            reached.append(bool(x.grad.any()))
        assert any(reached) if self.may_skip_levels else all(reached)
        for level, x in leaves(ctx).teacher:
            assert x.grad is None, f"gradient reached the teacher at {level}"
        for name, parameter in trained(head):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if teacher_channels != CHANNELS and self.has_adapters:
            assert any(p.grad.any() for _, p in trained(head))

    def test_auxiliary_losses_never_reach_the_student(self):
        head, ctx = self.head(), self.context(**RAGGED)
        auxiliary = [v for k, v in self.run(head, ctx)[0].items() if k.startswith("loss_aux")]
        if auxiliary:
            sum(auxiliary).backward()
        assert all(x.grad is None for _, x in leaves(ctx).student)
        assert bool(auxiliary) == bool(list(head.aux_parameters()))

    @pytest.mark.parametrize("spoiler", SPOILERS)
    def test_with_mask_padding_values_in_padded_cells_do_not_matter(self, spoiler):
        """Inf and NaN as well, in the loss and in all gradients."""
        channels = (CHANNELS, MORE_CHANNELS if self.adapts else CHANNELS)
        results = []
        for spoil in (False, True):
            head = self.head(channels, MASK_PADDING=True)
            ctx = self.context(**RAGGED, channels=channels)
            for level, x in self.padded(ctx) if spoil else ():
                with torch.no_grad():
                    x.masked_fill_(~ctx.valid_mask(level), spoiler)
            losses, total = self.run(head, ctx)
            total.backward()
            grads = {f"{i}": x.grad for i, (_, x) in enumerate(self.student_leaves(ctx, head))}
            grads |= {name: p.grad for name, p in trained(head)}
            results.append({**losses, **grads})
            for level, x in self.student_leaves(ctx, head):
                assert not x.grad.masked_select(~ctx.valid_mask(level)).any()
        for key, clean in results[0].items():
            torch.testing.assert_close(results[1][key], clean, msg=lambda m, k=key: f"{k}: {m}")

    def test_without_mask_padding_padded_cells_take_part(self):
        values = []
        for spoil in (False, True):
            ctx = self.context(**RAGGED, boxes=8)
            sides, generator = leaves(ctx), torch.Generator().manual_seed(3)
            for level, x in (*sides.student, *sides.teacher) if spoil else ():
                with torch.no_grad():
                    noise = 5 * torch.randn(x.shape, generator=generator)
                    x.add_(noise * ~ctx.valid_mask(level))
            values.append(self.run(self.head(MASK_PADDING=False), ctx)[1].item())
        assert values[0] != pytest.approx(values[1], rel=1e-6)

    @pytest.mark.parametrize("sizes", [((40, 56), (64, 33)), ((40, 56),)])
    def test_no_box_at_all(self, sizes):
        """Finite, and every parameter and feature stays in the graph (DDP waits for each)."""
        channels = (CHANNELS, MORE_CHANNELS if self.adapts else CHANNELS)
        head = self.head(channels)
        ctx = self.context(sizes=sizes, canvas=(64, 64), channels=channels, boxes=0)
        losses, total = self.run(head, ctx)
        total.backward()
        assert all(loss.isfinite() for loss in losses.values())
        for level, x in self.student_leaves(ctx, head):
            assert x.grad is not None and x.grad.isfinite().all(), level
        for name, parameter in trained(head):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_one_image_without_boxes_among_others(self):
        ctx = self.context(**RAGGED)
        ctx.gt[0] = ctx.gt[0][:0]
        losses, total = self.run(self.head(), ctx)
        total.backward()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())

    def test_one_image_on_a_larger_canvas_gives_the_same_loss(self):
        """With MASK_PADDING: a batch of one without padding, and the same one padded."""
        channels = (CHANNELS, MORE_CHANNELS if self.adapts else CHANNELS)
        head = self.head(channels, MASK_PADDING=True)
        alone = self.context(sizes=((64, 64),), canvas=(64, 64), channels=channels)
        padded = self.context(sizes=((64, 64),), canvas=(96, 128), channels=channels)
        padded.gt = copy.deepcopy(alone.gt)
        small, large = leaves(alone), leaves(padded)
        with torch.no_grad():
            for ours, theirs in ((small.student, large.student), (small.teacher, large.teacher)):
                for (_, x), (_, y) in zip(ours, theirs, strict=True):
                    y[..., : x.shape[2], : x.shape[3]] = x
        expected, found = self.run(head, alone)[0], self.run(head, padded)[0]
        for key, loss in expected.items():
            assert loss.isfinite() and loss > 0
            if key.startswith(self.blind_to_canvas):
                torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_features_in_half_precision_are_computed_in_fp32(self, dtype):
        head = self.head()
        half, full = (self.context(**RAGGED, dtype=dtype) for _ in range(2))
        for values in (full.student_features, full.teacher_features):
            values.update({k: v.detach().float() for k, v in values.items()})
        for outputs in (full.student_outputs, full.teacher_outputs):
            parts = outputs["dense"].parts().items()
            outputs["dense"] = DenseOutputs(
                **{name: [x.detach().float() for x in part] for name, part in parts}
            )
        found, total = self.run(head, half)
        expected, _ = self.run(head, full)
        for key, loss in found.items():
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected[key], **self.half)
        total.backward()
        for _, x in self.student_leaves(half, head):
            assert x.grad.dtype == dtype and x.grad.isfinite().all()

    @pytest.mark.parametrize("mask_padding", [True, False])
    def test_a_teacher_of_double_resolution(self, mask_padding):
        """Each of its cells split into four: the same loss. With MASK_PADDING its padding is out,
        in the blocks too that reach over the border."""
        head = self.head(MASK_PADDING=mask_padding)
        ctx, fine = self.context(**RAGGED), self.context(**RAGGED, teacher_scale=2.0)
        fine.gt = copy.deepcopy(ctx.gt)
        coarse_sides, fine_sides = leaves(ctx), leaves(fine)
        with torch.no_grad():
            for (_, x), (_, y) in zip(coarse_sides.student, fine_sides.student, strict=True):
                y.copy_(x)
            for (level, x), (_, y) in zip(coarse_sides.teacher, fine_sides.teacher, strict=True):
                y.copy_(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
                if mask_padding:
                    y.masked_fill_(~fine.teacher_valid_mask(level), float("nan"))
        expected, found = self.run(head, ctx)[0], self.run(head, fine)[0]
        for key, loss in found.items():
            if self.averages_teacher:
                torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=1e-6)
            assert loss.isfinite() and loss > 0
        sum(found.values()).backward()
        for level, x in self.student_leaves(fine, head):
            assert x.grad is not None and x.grad.isfinite().all(), level

    @pytest.mark.parametrize("scale", [2.0, 0.5])
    def test_teachers_of_other_sizes_give_finite_losses(self, scale):
        channels = (CHANNELS, MORE_CHANNELS if self.adapts else CHANNELS)
        losses, total = self.run(
            self.head(channels), self.context(**RAGGED, channels=channels, teacher_scale=scale)
        )
        total.backward()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())

    def test_levels_are_limited_by_the_config(self):
        for head in (
            self.head(LEVELS=("p4", "p3")),
            self.head(common={"LEVELS": ("p3", "p4")}),
            self.head(common={"LEVELS": ("p5",)}, LEVELS=("p3", "p4")),
        ):
            assert head.levels == ("p3", "p4"), "finest first"
            ctx = self.context(**RAGGED)
            self.run(head, ctx)[1].backward()
            assert ctx.student_features["p5"].grad is None
            assert ctx.student_outputs["dense"].logits[2].grad is None

    def test_the_head_runs_for_all_steps_without_keeping_their_graph(self):
        """Two steps with one head: nothing of the first is needed in the second."""
        head = self.head()
        for seed in (0, 1):
            ctx = self.context(**RAGGED, seed=seed)
            self.run(head, ctx)[1].backward()
