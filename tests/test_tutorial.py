"""docs/tutorial.ipynb: its cells run, on a few pictures and iterations, and it is kept clean.

They run in this process, one after another in one namespace, as a kernel would: the packages of
Jupyter are no part of the test environment.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch
import toy_data  # noqa: F401  (registers the toy backbone)

from projects.kd.data.shapes import generate

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs/tutorial.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Values of the cell tagged parameters, for seconds in place of minutes.

    Teacher and students are the configs' Cascade R-CNNs on a backbone of a few thousand weights.
    """
    folder = tmp_path / "pictures"
    generate("train", str(folder), 3)
    data = ["tutorial_pictures", str(folder / "instances.json"), str(folder / "images")]
    monkeypatch.chdir(ROOT / "docs")
    more = {
        "MODEL.BACKBONE.NAME": "build_toy_fpn_backbone",
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[18], [36]],
        "MODEL.RPN.IN_FEATURES": ["p3", "p4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4"],
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "KD.CWD.LEVELS": ("p3", "p4"),
        "KD.TEACHER.CONFIG_FILE": str(tmp_path / "out/teacher/config.yaml"),
        "KD.DATASETS": [data],
        "DATASETS.TRAIN": ("tutorial_pictures",),
        "DATASETS.TEST": ("tutorial_pictures",),
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.AMP.ENABLED": False,
        "TEST.EVAL_PERIOD": 0,
        "TEST.DETECTIONS_PER_IMAGE": 5,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    }
    return {
        "OUTPUT": str(tmp_path / "out"),
        "TEACHER_ITERATIONS": 2,
        "STUDENT_ITERATIONS": 2,
        "MORE": [word for key, value in more.items() for word in (key, str(value))],
    }


def run(names: dict, cells) -> dict:
    """Execute cells; those tagged parameters are followed by ``names``."""
    space: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() <= space.keys()
            space.update(names)
    return space


def test_all_cells_run(short, capsys):
    levels = {name: logging.getLogger(name).level for name in ("projects", "detectron2", "fvcore")}
    try:
        space = run(short, CODE)
    finally:
        figures = [plt.figure(number) for number in plt.get_fignums()]
        plt.close("all")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert list(space["found"]) == ["teacher", "student", "student + CWD"]
    assert len(figures) == 3
    assert [len(axes.images) for axes in figures[2].axes] == [1] * 6
    printed = capsys.readouterr().out
    assert "3 images with" in printed and "student + CWD" in printed
    out = Path(short["OUTPUT"])
    for name in ("teacher", "student", "student_cwd"):
        assert torch.load(out / name / "model_final.pth", weights_only=True)["iteration"] == 1
    assert "loss_kd_cwd" in (out / "student_cwd/metrics.json").read_text()


def test_it_is_kept_without_outputs_and_in_the_format():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in CODE) == 1
    assert "tutorial.ipynb" in (ROOT / "docs/index.md").read_text()
