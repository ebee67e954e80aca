"""Random numbers as a function of where training stands, so that no generator state is saved.

Every training step and every loaded image seeds Python's, numpy's and torch's generators from a
few integers: (seed, iteration, rank, micro-step) or (seed, rank, position in the data stream,
attempt). A resumed run thus draws what the uninterrupted one would have drawn, whatever happened
between (an evaluation, another number of loader workers).
"""

from __future__ import annotations

import random

import numpy as np
import torch

STEP = 0  # first word of a seed: keeps the streams of steps and of images apart
IMAGE = 1
UNLABELLED = 2  # images of KD.UNLABELED


def seed_generators(*words: int, cuda: bool = False) -> None:
    """Seed Python, numpy and torch from non-negative integers, mixed by numpy's SeedSequence.

    Args:
        words: any number of non-negative integers; equal words give equal generators.
        cuda: also seed the current CUDA device.
    """
    for_python, for_numpy, for_torch = np.random.SeedSequence(words).generate_state(3, np.uint64)
    random.seed(int(for_python))
    np.random.seed(int(for_numpy) % 2**32)
    # not torch.manual_seed: in a loader worker that would queue work for an unused CUDA context
    torch.default_generator.manual_seed(int(for_torch) >> 1)
    if cuda:
        torch.cuda.manual_seed(int(for_torch) >> 1)
