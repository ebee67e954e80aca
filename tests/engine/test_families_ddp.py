"""Two processes train every family of shipped configs as one process with both batches would."""

import re

import pytest
import torch
from family_worker import CACHED, CASES, CONFIGS, ROOT, SIZES, run_rank
from kd_processes import run_ranks

from projects.kd import load_config

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Per rank: config to what it saw, from one start of two processes."""
    folder = tmp_path_factory.mktemp("families")
    run_ranks(run_rank, str(folder), count=len(SIZES))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(len(SIZES))]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_and_weights_stay_equal(ranks, name):
    for seen in (rank[name] for rank in ranks):
        assert seen["same"] and seen["learnt"] > 1e-4
        assert seen["idle_found"] == seen["idle"]
        assert max(seen["errors"].values()) < 1e-4
        assert seen["finds"] or not seen["idle"]


def test_a_level_that_no_head_reads_is_found(ranks):
    top = [f"backbone.top_block.p7.{part}" for part in ("bias", "weight")]
    for rank in ranks:
        assert rank["shapes/retinanet_student"]["idle"] == top
        assert rank["shapes/retinanet_student_cwd"]["idle"] == [f"student.{name}" for name in top]
        # where every parameter is used, DDP does not look
        assert not rank["shapes/faster_rcnn_student"]["finds"]


def test_each_process_keeps_its_own_teachers_answers(ranks):
    for rank in ranks:
        assert rank["shapes/retinanet_student_cwd"]["teacher_ran"] == 2
        # the copy beside it, from which the expected gradients are, has asked before
        assert rank[CACHED]["teacher_ran"] == 0


def test_every_family_is_here():
    def parts(path):
        """What a detector is made of, as (key, value)."""
        model = load_config(str(path)).MODEL
        keys = {
            "GeneralizedRCNN": ("ROI_HEADS", "MASK_ON", "KEYPOINT_ON"),
            "PanopticFPN": ("ROI_HEADS", "MASK_ON", "SEM_SEG_HEAD"),
            "SemanticSegmentor": ("SEM_SEG_HEAD",),
        }.get(model.META_ARCHITECTURE, ())
        values = {key: model[key] for key in ("META_ARCHITECTURE", *keys)}
        return {(key, getattr(value, "NAME", value)) for key, value in values.items()}

    # distilled students are made of the same parts as the plain ones
    skipped = re.compile("suites/|methods/|/Base-|_from_|_student_")
    shipped = [path for path in (ROOT / "configs").rglob("*.yaml") if not skipped.search(str(path))]
    here = set().union(*(parts(ROOT / f"configs/{name}.yaml") for name in CONFIGS))
    assert here == set().union(*map(parts, shipped))
