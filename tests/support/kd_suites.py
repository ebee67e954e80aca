"""What tests of comparisons share: a suite, its data, and trainings that only pretend."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import cv2
import numpy as np

from projects.kd.analysis import report_files, suites
from projects.kd.analysis.run_folders import Ended

ROOT = Path(__file__).resolve().parents[2]


def make_suite() -> dict:
    """A teacher, a plain and a distilled student."""
    teacher = str(ROOT / "configs/shapes/retinanet_teacher.yaml")
    student = str(ROOT / "configs/shapes/retinanet_student.yaml")
    distilled = str(ROOT / "configs/shapes/retinanet_student_cwd.yaml")
    return {
        "title": "test",
        "dataset": "compare_toy",
        "baseline": "student",
        "show": ["teacher", "student"],
        "rows": [
            {"name": "student", "config": student},
            {"name": "teacher", "config": teacher, "role": "teacher"},
            {"name": "student+X", "config": distilled, "opts": ["SOLVER.MAX_ITER", 7]},
        ],
    }


@contextlib.contextmanager
def registered_toy_data(tmp_path):
    """The data set compare_toy: one image, one box."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    image = np.full((40, 60, 3), 90, np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    content = {
        "images": [{"id": 3, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 5,
                "bbox": [5, 5, 20, 20],
                "area": 400,
                "iscrowd": 0,
            }  # fmt: skip
        ],
        "categories": [{"id": 5, "name": "thing"}],
    }
    (tmp_path / "toy.json").write_text(json.dumps(content))
    register_coco_instances("compare_toy", {}, str(tmp_path / "toy.json"), str(tmp_path))
    try:
        yield
    finally:
        DatasetCatalog.remove("compare_toy")
        MetadataCatalog.remove("compare_toy")


def fake_training(monkeypatch, scores, status=0):
    """Each call writes what train_net.py would; returns the list of commands."""
    commands = []

    def run(command, log, threads, on_line, on_start):
        commands.append(command)
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        Path(log).write_text("error: something is wrong\n" if status else "fine\n")
        on_line("[07/27 12:00:00] d2 INFO:  eta: 0:00:01  iter: 9  time: 0.25  max_mem: 100M\n")
        if status:
            return Ended(status, 3_000_000)
        line = {"iteration": 9, "bbox/AP": scores[len(commands) - 1]}
        (folder / "metrics.json").write_text(json.dumps(line) + "\n")
        (folder / "inference").mkdir(exist_ok=True)
        box = {"image_id": 3, "category_id": 5, "bbox": [4, 4, 20, 20], "score": 0.9}
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps([box]))
        return Ended(0, 2_000_000)

    monkeypatch.setattr(suites, "run_logged", run)
    return commands


def execute(suite, output, seeds=(1, 2), opts=()):
    runs = suites.make_runs(suite, list(seeds), str(output), list(opts))
    for i, run in enumerate(runs):
        run.execute(f"{i}")
    return report_files.write_report(suite, runs, str(output), "command")
