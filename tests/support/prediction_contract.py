"""The contract for heads on predictions, with toy RetinaNets on both sides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from head_contract import HeadContract
from kd_testing import CHANNELS, head_cfg, leaves, make_context, toy_info, toy_retinanet

from projects.kd.detectors import taps_for
from projects.kd.heads import build_imitation_heads
from projects.kd.predict import DenseOutputs


class PredictionContract(HeadContract):
    """The contract for heads on predictions: of toy detectors with their heads.

    ``toy``: channels to the detector of a side; RetinaNet unless a test class says otherwise.
    """

    reads = "dense"
    half = {"rtol": 0.05, "atol": 1e-4}  # detectors' layers run in the step's precision
    toy = staticmethod(toy_retinanet)

    def infos(self, channels):
        return tuple(toy_info(number, model=self.toy(number)) for number in channels)

    def context(self, **kwargs):
        return prediction_context(toy=self.toy, **kwargs)

    @staticmethod
    def run(head, ctx):
        with EventStorage():
            return HeadContract.run(head, ctx)


def prediction_context(same: bool = False, toy=toy_retinanet, **kwargs):
    """With models, and the other outputs beside the dense logits.

    ``same``: dense outputs of both sides are what the student's head says.
    """
    ctx = make_context(same=same, **kwargs)
    channels = kwargs.get("channels", (CHANNELS, CHANNELS))
    student, teacher = (toy(number) for number in channels)
    ctx.student, ctx.teacher = student, SimpleNamespace(model=teacher)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        maps = [x.detach().float() for x in ctx.student_features.values()]
        said = taps_for(student)["dense"].select(student.head(maps)).parts()
    for outputs in (ctx.student_outputs, ctx.teacher_outputs):
        parts = {"logits": outputs["dense"].logits}
        for name, own in list(said.items())[1:]:
            sizes = [
                (*y.shape[:2], *x.shape[-2:]) for x, y in zip(parts["logits"], own, strict=True)
            ]
            parts[name] = [torch.randn(size, generator=generator) for size in sizes]
            dtype = parts["logits"][0].dtype
            parts[name] = [x.to(dtype).requires_grad_() for x in parts[name]]
        outputs["dense"] = DenseOutputs(**parts)
        if same:
            with torch.no_grad():
                for name, part in outputs["dense"].parts().items():
                    for x, y in zip(part, said[name], strict=True):
                        x.copy_(y)
    return ctx


LARGER = {"TEACHER": {"INPUT_SCALE": 2.0}}


def enlarged(scale: float = 2.0, toy=toy_retinanet):
    """A toy teacher with anchors of ``scale`` times the student's."""
    model = toy()
    for anchors in model.anchor_generator.cell_anchors:
        anchors.mul_(scale)
    return model


class DenseContract(PredictionContract):
    """The contract for heads that read the teacher's ``dense`` tap."""

    adapts = False

    def padded(self, ctx):
        return [*leaves(ctx).student, *leaves(ctx).teacher]

    def larger(self, teacher, **node):
        """A head whose teacher sees the image at twice the size."""
        infos = toy_info(model=self.toy()), toy_info(model=teacher)
        cfg = head_cfg(self.name, LARGER, **{**self.node, **node})
        return build_imitation_heads(cfg, *infos)[self.name]

    @pytest.mark.parametrize("mask_padding", [True, False])
    def test_a_teacher_of_double_resolution(self, mask_padding):
        """With anchors of twice the size, every second of its cells is one of the student's."""
        coarse = self.context()
        expected = self.run(self.head(MASK_PADDING=mask_padding), coarse)[0]
        fine = self.context(teacher_scale=2.0)
        fine.gt = coarse.gt
        sides = leaves(coarse), leaves(fine)
        with torch.no_grad():
            for (_, x), (_, y) in zip(*(s.student for s in sides), strict=True):
                y.copy_(x)
            for (_, x), (_, y) in zip(*(s.teacher for s in sides), strict=True):
                y.copy_(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        head = self.larger(enlarged(toy=self.toy), MASK_PADDING=mask_padding)
        assert {match.step for match in head.match.values()} == {2}
        for key, loss in self.run(head, fine)[0].items():
            assert loss > 0
            if self.averages_teacher:
                torch.testing.assert_close(loss, expected[key])

    def test_teachers_of_other_sizes_give_finite_losses(self):
        """With the student's own anchors, the teacher's next coarser level predicts for them."""
        head = self.larger(self.toy())
        assert head.levels == ("p3", "p4") and [head.match[x].index for x in head.levels] == [1, 2]
        ctx = self.context(teacher_scale=2.0)
        losses, total = self.run(head, ctx)
        total.backward()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        assert ctx.student_outputs["dense"].logits[2].grad is None
