"""The contract for heads on predictions, with toy RetinaNets on both sides."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from detectron2.utils.events import EventStorage
from head_contract import HeadContract
from kd_testing import CHANNELS, make_context, toy_info, toy_retinanet

from projects.kd.predict import DenseOutputs


class PredictionContract(HeadContract):
    """The contract for heads on predictions: of toy RetinaNets with their heads."""

    reads = "dense"
    half = {"rtol": 0.05, "atol": 1e-4}  # detectors' layers run in the step's precision

    def infos(self, channels):
        return tuple(toy_info(number, model=toy_retinanet(number)) for number in channels)

    def context(self, **kwargs):
        return prediction_context(**kwargs)

    @staticmethod
    def run(head, ctx):
        with EventStorage():
            return HeadContract.run(head, ctx)


def prediction_context(same: bool = False, **kwargs):
    """With models, and deltas beside the dense logits; ``same``: as the student's head says."""
    ctx = make_context(same=same, **kwargs)
    channels = kwargs.get("channels", (CHANNELS, CHANNELS))
    student, teacher = (toy_retinanet(number) for number in channels)
    ctx.student, ctx.teacher = student, SimpleNamespace(model=teacher)
    generator = torch.Generator().manual_seed(5)
    for outputs in (ctx.student_outputs, ctx.teacher_outputs):
        logits = outputs["dense"].logits
        deltas = [
            torch.randn(len(x), 16, *x.shape[-2:], generator=generator).to(x.dtype).requires_grad_()
            for x in logits
        ]
        outputs["dense"] = DenseOutputs(logits, deltas)
    if same:
        with torch.no_grad():
            found = student.head([x.detach() for x in ctx.student_features.values()])
            for ours, theirs in zip(
                ctx.student_outputs["dense"].parts().values(), found, strict=True
            ):
                for x, y in zip(ours, theirs, strict=True):
                    x.copy_(y)
    return ctx
