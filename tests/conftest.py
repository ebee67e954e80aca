"""Puts this folder on the path of all tests, for the helpers beside it, and keeps torch small."""

import logging
import os

import pytest
import torch

torch.set_num_threads(1)
os.environ["KD_HUGE_PAGES"] = "0"  # a command that a test runs must not start pytest anew


@pytest.fixture(autouse=True)
def _heard_by_caplog():
    """A run in the same process turns propagation of these logs off, as detectron2 does, and
    kd-benchmark disables warnings.
    """
    logging.disable(logging.NOTSET)
    for name in ("projects", "detectron2", "fvcore"):
        logging.getLogger(name).propagate = True
