"""The precision of a training step, and the order of its numbers in memory."""

from __future__ import annotations

import logging

import torch
from detectron2.utils.logger import log_first_n


def step_dtype(cfg) -> torch.dtype | None:
    """What a step is computed in by autocast; None = float32.

    SOLVER.AMP.DTYPE "auto" is bfloat16 where the device has instructions for it, float16 on other
    GPUs, and float32 on other CPUs, where bfloat16 would take several times as long. The choice is
    logged once.
    """
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return None
    if amp.DTYPE != "auto":
        return getattr(torch, amp.DTYPE)
    if cfg.MODEL.DEVICE == "cpu":
        dtype = torch.bfloat16 if cpu_computes_bfloat16() else None
    else:
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if able else torch.float16
    name = str(dtype or torch.float32).removeprefix("torch.")
    text = f"SOLVER.AMP.DTYPE auto: {name} on this {cfg.MODEL.DEVICE}"
    log_first_n(logging.INFO, text, name=__name__, key="message")
    return dtype


def in_channels_last(asked: bool | None, device: str) -> bool:
    """What SOLVER.CHANNELS_LAST or KD.TEACHER.CHANNELS_LAST comes to on a device.

    None is yes on a CPU: there a step takes from 0.5 to 0.9 of the time, and a ResNet in bfloat16 a
    quarter (docs/costs.md). On a GPU it was not measured.
    """
    return device == "cpu" if asked is None else asked


def cpu_computes_bfloat16() -> bool:
    """False only where torch's library for CPUs says so."""
    known = torch.backends.mkldnn.is_available()
    return not known or torch.ops.mkldnn._is_mkldnn_bf16_supported()
