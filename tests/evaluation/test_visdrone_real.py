"""The real VisDrone image: conversion, some iterations, evaluation, result files, pictures.

The same as the commands in datasets/README.md, those that register data sets in a process each.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from projects.kd.commands.evaluate import PARTS as EVALUATE

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KD_TEST_DATA", ROOT.parent / "shared" / "data"))
SAMPLE = DATA / "visdrone_sample"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", "16", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(160,)", "INPUT.MIN_SIZE_TEST", "160", "SEED", "1"),
]


@pytest.mark.real_data
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no visdrone_sample in KD_TEST_DATA")
def test_from_the_archive_to_the_result_files(tmp_path):
    root = tmp_path / "visdrone"
    for split in ("train", "val"):
        shutil.copytree(SAMPLE, root / f"VisDrone2019-DET-{split}")
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    text = run("tools/convert.py", "visdrone", "--crops", "--jobs", 1)
    assert "82 boxes" in text and "5 ignored regions" in text and "1 others" in text
    content = json.loads((root / "annotations" / "visdrone_val.json").read_text())
    lines = next((SAMPLE / "annotations").iterdir()).read_text().split()
    rows = [line.split(",") for line in lines]
    rows = [row for row in rows if row[5] not in ("0", "11")]
    written = [a["bbox"] for a in content["annotations"]]
    assert written == [[int(value) for value in row[:4]] for row in rows]

    out = tmp_path / "out"
    config = "configs/VisDrone/retinanet_R18_FPN.yaml"
    settings = [*SMALL, "OUTPUT_DIR", out, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 1]
    run("train_net.py", "--config-file", config, *settings)
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    keys = set().union(*metrics)
    assert {"visdrone/AP", "visdrone/AR500", "visdrone_coco/AP", "bbox/APs"} <= keys
    files = list((out / "inference" / "visdrone_submission").iterdir())
    assert [path.name for path in files] == ["0000002_00005_d_0000014.txt"]
    before = (out / "inference" / "coco_instances_results.json").read_bytes()

    # tiles find other boxes
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    tiles = ["TEST.TILES.ENABLED", True, "TEST.TILES.SIZE", 128, "TEST.TILES.OVERLAP", 32]
    settings = [*SMALL, "OUTPUT_DIR", out, *weights]
    run("train_net.py", "--config-file", config, "--eval-only", *settings, *tiles)
    assert (out / "inference" / "coco_instances_results.json").read_bytes() != before

    # a perfect submission, through the tool for result files
    perfect = tmp_path / "perfect"
    perfect.mkdir()
    rows = [[*row[:4], "0.9", row[5], "-1", "-1"] for row in rows]
    (perfect / files[0].name).write_text("\n".join(",".join(row) for row in rows) + "\n")
    data = root / "VisDrone2019-DET-val"
    for folder, wanted in ((perfect, 100), (files[0].parent, None)):
        path = tmp_path / "metrics.json"
        words = ["--data", data, "--results", folder, "--output", path]
        EVALUATE.call(["visdrone", *words])
        result = json.loads(path.read_text())["toolkit"]
        assert wanted is None or result["AP"] == pytest.approx(wanted)
        assert math.isnan(result["AP-bus"]) and np.isfinite(result["AP"])

    words = ["--dataset", "visdrone_val", "--output", out / "s.png"]
    sizes = run("tools/visualize.py", "sizes", *words)
    assert sizes.startswith("small 70.7 %, medium 29.3 %")
    results = out / "inference" / "coco_instances_results.json"
    words = ["--dataset", "visdrone_val", "--results", results, "--output", out / "f.png"]
    counts = run("tools/visualize.py", "sizes", *words).split()
    assert int(counts[1]) + int(counts[3]) == 58  # found and missed small objects
    words = ["--dataset", "visdrone_train_crops", "--output", out / "g.png"]
    run("tools/visualize.py", "data", *words)
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in "sfg")
