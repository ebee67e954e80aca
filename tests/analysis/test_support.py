"""The table of heads by detectors is what the code says, and the page of methods holds it."""

from pathlib import Path

import pytest
from kd_detectors import detector_cfg
from segmentation import segmentor_cfg

from dev import make_support_table
from projects.kd.analysis.support import BEGIN, END, between_markers, feature_heads, verdicts
from projects.kd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    text = (ROOT / "docs/methods/index.md").read_text()
    assert between_markers(text, make_support_table.table()) == text, (
        "run: python -m dev.make_support_table --write"
    )


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("RetinaNet", {"features", "dense"}),
        ("FCOS", {"features", "dense"}),
        ("Faster R-CNN", {"features"}),
        ("Cascade Mask R-CNN", {"features", "masks"}),
        ("Keypoint R-CNN", {"features", "keypoints"}),
        ("Panoptic FPN", {"features", "masks", "sem_seg", "decoder"}),
        ("PSPNet", {"features", "sem_seg", "decoder"}),
    ],
)
def test_what_cwd_compares(name, works):
    cfg = segmentor_cfg() if name == "PSPNet" else detector_cfg(name)
    found = verdicts(cfg, cfg)["CWD"]
    assert set(found) == {"features", "dense", "masks", "keypoints", "sem_seg", "decoder"}
    assert {target for target in found if not found[target]} == works
    for target in set(found) - works:
        assert found[target].startswith("KD.CWD.TARGET"), "the refusal names the key"


def test_pairs_of_two_families():
    one, two = detector_cfg("RetinaNet"), detector_cfg("Mask R-CNN")
    found = verdicts(one, two)
    assert not found["CWD"]["features"] and found["CWD"]["dense"] and found["CWD"]["masks"]
    assert {"CWD", "FGFI", "ICD", "Mimic", "PKD"} <= set(feature_heads(one, two))


def test_markers_are_needed():
    assert (
        between_markers(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    )
    with pytest.raises(ConfigError, match="no lines"):
        between_markers("nothing", "new\n")
