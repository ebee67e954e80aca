"""kd-export from a shell: the file, the comparison, the times; evaluation and demo of it."""

import json
import random

import coco_files
import cv2
import numpy as np
import pytest
import torch
import toy_data  # noqa: F401  (registers the toy backbone)
from kd_detectors import detector_cfg
from kd_models import build, write_config

from projects.kd.analysis import latency
from projects.kd.commands import demo, export, train
from projects.kd.config import load_config
from projects.kd.deploy.lower import lower
from projects.kd.deploy.runtime import ExportedDetector
from projects.kd.deploy.use import exported_detector
from projects.kd.errors import ConfigError, DataError

DATA = "kd_test_export"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run with config.yaml, model_final.pth and metrics.json."""
    folder = tmp_path_factory.mktemp("run")
    annotations = coco_files.write(folder, "instances", coco_files.plain(random.Random(0)))
    cfg = detector_cfg(
        "FCOS",
        MODEL__BACKBONE__NAME="build_toy_fpn_backbone",
        KD__DATASETS=[[DATA, annotations, str(folder)]],
        DATASETS__TRAIN=(DATA,),
        DATASETS__TEST=(DATA,),
        OUTPUT_DIR=str(folder / "out"),
    )
    model = build(cfg)
    model.head.cls_score.weight.data *= 30  # scores further apart than rounding
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    write_config(cfg, folder / "config.yaml")
    lines = [{"iteration": 1, "bbox/AP": 3.0}, {"total_loss": 1.0}, {"bbox/AP": 4.5}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def words(run, output, *more):
    weights = ("MODEL.WEIGHTS", str(run / "model_final.pth"))
    given = ("--config-file", str(run / "config.yaml"), "--output", str(output))
    return [*given, *more, *weights]


def call(run, output, *more):
    return export.main(export.parse_arguments(words(run, output, *more)))


def test_a_file_is_checked_timed_evaluated_and_shown(run, tmp_path, capsys):
    path, plot = tmp_path / "student.ts", tmp_path / "latency.png"
    facts = call(
        *(run, path, "--check", "3", "--ap", "--benchmark", f"plain={run}"),
        *("--rounds", "2", "--plot", str(plot)),
    )
    assert json.loads(path.with_suffix(".ts.json").read_text()) == json.loads(json.dumps(facts))
    assert facts["thing_classes"] == list(coco_files.CLASSES)
    assert facts["check"]["images"] == 3 and facts["check"]["boxes"] < 1e-3
    both = facts["evaluation"]
    assert both["exported"]["bbox/AP"] == pytest.approx(both["detector"]["bbox/AP"], abs=0.05)
    student, file, plain = facts["benchmark"]
    assert [x["name"] for x in (student, file, plain)] == ["student", "student.ts", "plain"]
    assert student["ap"] == plain["ap"] == 4.5 and student["ratio"]["median"] == 1.0
    assert student["parameters"] == plain["parameters"] > 1e3
    assert student["macs"] == plain["macs"] > 1e4 and file["bytes"] == path.stat().st_size
    assert cv2.imread(str(plot)) is not None
    assert "GMAC" in capsys.readouterr().out

    given = ["--config-file", str(run / "config.yaml"), "--eval-only", "MODEL.WEIGHTS", str(path)]
    results = train.main(train.parse_arguments([*given, "OUTPUT_DIR", str(tmp_path / "out")]))
    assert results["bbox"]["AP"] == pytest.approx(both["exported"]["bbox/AP"])
    shown = ["--config-file", str(run / "config.yaml"), "--input", str(run / "1.png")]
    shown += ["--output", str(tmp_path / "shown"), "--confidence-threshold", "0"]
    found = []
    for weights in (path, run / "model_final.pth"):
        demo.main(demo.parse_arguments([*shown, "MODEL.WEIGHTS", str(weights)]))
        found.append(json.loads((tmp_path / "shown/detections.json").read_text()))
    (exported,), (own,) = (list(x.values()) for x in found)
    assert len(exported) == len(own) > 0
    for one, other in zip(exported, own, strict=True):
        assert np.allclose(one["box"], other["box"], atol=0.02)
    for key, value in (
        ("TEST.AUG.ENABLED", "True"),
        ("TEST.QUICK.FUSE_BN", "True"),
        ("TEST.QUICK.DTYPE", "bfloat16"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
    ):
        cfg = load_config(str(run / "config.yaml"), ["MODEL.WEIGHTS", str(path), key, value])
        with pytest.raises(ConfigError, match=key):
            exported_detector(cfg)


def test_lower_precision(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    single, half, eight = (tmp_path / f"{x}.onnx" for x in ("float32", "float16", "int8"))
    call(run, single, "--no-nms")
    lower(str(single), str(half), "float16")
    facts = call(
        *(run, eight, "--no-nms", "--precision", "int8"),
        *("--check", "1", "--calibration-images", "2"),
    )
    assert facts["precision"] == "int8" and facts["opset"] == 19
    assert facts["check"]["detections"] > 0
    image = torch.rand(3, 64, 64) * 255
    ours, theirs = (ExportedDetector.load(str(x), threads=1) for x in (single, half))
    assert theirs.facts == {**ours.facts, "precision": "float16"}
    limits = {"boxes": 0.5, "scores": 0.02, "levels": 0.0}
    found = (x.run(image[None]) for x in (ours, theirs))
    for one, other, limit in zip(*found, limits.values(), strict=True):
        torch.testing.assert_close(other, one, rtol=0.0, atol=limit)
    kernels = [
        {x.data_type for x in onnx.load(path).graph.initializer if len(x.dims) == 4}
        for path in (single, half, eight)
    ]
    kind = onnx.TensorProto
    assert kernels == [{kind.FLOAT}, {kind.FLOAT16}, {kind.INT8}]
    old = eight.read_bytes()
    with pytest.raises(ConfigError, match="--precision int8: there are no images to calibrate"):
        lower(str(single), str(eight), "int8", [])
    assert eight.read_bytes() == old


@pytest.mark.parametrize(
    ("name", "more", "line"),
    [
        ("a.pb", (), "--output: .* has to end in .onnx"),
        ("a.ts", ("--precision", "int8"), "--precision and --opset are of ONNX"),
        ("a.ts", ("--plot", "x.png"), "--plot needs --benchmark"),
        ("a.onnx", ("--opset", "11"), "--opset is 11, it must lie in"),
        ("a.ts", ("--benchmark", "plain", "--rounds", "1"), "--benchmark: 'plain' is not NAME="),
    ],
)
def test_wrong_flags_are_one_line(run, tmp_path, monkeypatch, name, more, line):
    monkeypatch.chdir(tmp_path)
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match=line) as error:
        call(run, tmp_path / name, *more)
    assert "\n" not in str(error.value)


def test_weights_of_another_config_and_data_without_images(run, tmp_path):
    toy = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}
    other = detector_cfg("GFL", **toy, DATASETS__TEST=(), DATASETS__TRAIN=())
    config = write_config(other, tmp_path / "other.yaml")
    given = ["--config-file", config, "--output", str(tmp_path / "a.ts"), "MODEL.WEIGHTS"]
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: .* lacks .* of the student's parameters"):
        export.main(export.parse_arguments([*given, str(run / "model_final.pth")]))
    args = export.parse_arguments(words(run, tmp_path / "a.ts"))
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty: name a data set"):
        export.records_of(args, (), 4, "DATASETS.TRAIN")
    with pytest.raises(ConfigError, match="DATASETS.TRAIN: no data set 'nowhere' is registered"):
        export.records_of(args, ("nowhere",), 4, "DATASETS.TRAIN")
    (tmp_path / "empty").mkdir()
    args.images = [str(tmp_path / "empty")]
    with pytest.raises(DataError, match="--images: no image .* in folder"):
        export.records_of(args, (), 4, "DATASETS.TRAIN")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ConfigError, match="there is no .*config.yaml"):
        latency.named_run(f"plain={tmp_path}")
    assert list(tmp_path.iterdir()) == [tmp_path / "other.yaml"]
