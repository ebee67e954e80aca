"""CSA's assistant as a detector, to see whether it has anything to teach."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.mapper import MultiResolutionMapper
from ..distiller import DistillMetaArch, build_training_model
from ..errors import ConfigError
from ..heads.csa import CSA
from ..predict.base import step_precision
from ..weights.loading import load_run

logger = logging.getLogger(__name__)


class AssistantDetector(nn.Module):
    """Detections from the assistant's features through its head (KD.CSA.HEAD).

    It needs the teacher at every image, so it is a diagnostic and no detector to deploy.

    Args:
        wrapper: with a trained CSA among its heads.
    """

    def __init__(self, wrapper: DistillMetaArch):
        super().__init__()
        self.wrapper = wrapper

    @property
    def student(self) -> nn.Module:
        """The student whose features it uses."""
        return self.wrapper.student

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """detectron2's ``[{"instances": ...}]``, in pixels of the original images.

        Args:
            batched_inputs: as in :meth:`DistillMetaArch.forward`.
        """
        with EventStorage():  # taps and heads ask for the iteration
            ctx, _ = self.wrapper.observe(batched_inputs)
        csa = _csa(self.wrapper)
        with torch.autocast(self.wrapper.device.type, enabled=False):
            features = csa.assist(ctx)
        with step_precision(next(iter(ctx.student_features.values()))):
            found = csa.head.predictor(ctx).infer(features, ctx.image_sizes)
        sizes = [(x["height"], x["width"]) for x in batched_inputs]
        return [
            {"instances": detector_postprocess(instances, *size)}
            for instances, size in zip(found, sizes, strict=True)
        ]


def _csa(wrapper: DistillMetaArch) -> CSA:
    return next(head for head in wrapper.heads.values() if isinstance(head, CSA))


def build_assistant(cfg) -> tuple[AssistantDetector, MultiResolutionMapper]:
    """The assistant of the training checkpoint MODEL.WEIGHTS, and a mapper for its input.

    Raises:
        ConfigError: no CSA in the config, or no heads in the checkpoint.
    """
    if not cfg.KD.META_ARCHITECTURE or "CSA" not in cfg.KD.HEADS:
        raise ConfigError("KD.HEADS: --assistant needs a config that trains with CSA")
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise ConfigError("MODEL.WEIGHTS is empty: name the training checkpoint to evaluate")
    wrapper = build_training_model(cfg).eval()
    load_run(wrapper, path, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    return AssistantDetector(wrapper), MultiResolutionMapper(cfg, is_train=False)


def judge(assistant: Mapping, student: Mapping) -> str:
    """One line on the box AP of both, logged as a warning where the assistant is not better.

    Args:
        assistant, student: what :func:`~projects.kd.evaluation.evaluate` gave for either.
    """
    if "bbox" not in assistant:  # several data sets
        assistant, student = (
            {"bbox": {"AP": sum(x["bbox"]["AP"] for x in y.values()) / max(len(y), 1)}}
            for y in (assistant, student)
        )
    ours, theirs = assistant["bbox"]["AP"], student["bbox"]["AP"]
    line = f"assistant {ours:.2f} AP, student {theirs:.2f} AP"
    if ours > theirs:
        logger.info("%s: it has something to teach", line)
    else:
        logger.warning(
            "%s: the assistant is not better than its student, distilling from it is pointless; "
            "train it longer (SOLVER.MAX_ITER), or with KD.CSA.RATES, POSITIONS or OPTIMIZER "
            "changed",
            line,
        )
    return line
