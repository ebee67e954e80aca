"""kd-evaluate teacher, on a tiny pair of detectors and a data set on the disk."""

import json
from pathlib import Path

import pytest
import torch

from projects.kd import ConfigError, build_teacher, load_config
from projects.kd.commands.evaluate import PARTS as EVALUATE


def evaluate_teacher(*words):
    return EVALUATE.call(["teacher", *words])


@pytest.fixture
def evaluated(monkeypatch):
    """Calls of the evaluation: (config, model, folder)."""
    calls = []

    def evaluate(cfg, model, names=None, output_dir=None):
        calls.append((cfg, model, output_dir))
        return {"bbox": {"AP": 12.5}}

    monkeypatch.setattr("projects.kd.commands.evaluate.teacher.evaluate", evaluate)
    return calls


def test_teacher_is_evaluated_on_its_own_input(config, folder, evaluated):
    report = evaluate_teacher("--config-file", config)
    ((cfg, model, output),) = evaluated
    weights = build_teacher(cfg).model.state_dict()
    assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())
    assert not model.training
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT) == (96, 128, "RGB")
    assert report["results"] == {"bbox": {"AP": 12.5}}
    assert Path(output) == folder / "out" / "teacher_evaluation"
    assert json.loads((Path(output) / "metrics.json").read_text()) == report


def test_teacher_on_the_students_input_keeps_its_channel_order(config, evaluated):
    evaluate_teacher("--config-file", config, "--student-input")
    cfg = evaluated[0][0]
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT) == (64, 96, "RGB")
    options = ("--student-input", "KD.TEACHER.INPUT_SCALE", "2.0")
    evaluate_teacher("--config-file", config, *options)
    assert (evaluated[1][0].INPUT.MIN_SIZE_TEST, evaluated[1][0].INPUT.MAX_SIZE_TEST) == (128, 192)


def test_an_ordinary_config_is_its_own_teacher(config, folder, evaluated):
    plain = folder / "teacher.yaml"
    with pytest.raises(ConfigError, match=r"^MODEL\.WEIGHTS is empty"):
        evaluate_teacher("--config-file", plain)
    weights = str(folder / "teacher.pth")
    evaluate_teacher("--config-file", plain, "MODEL.WEIGHTS", weights)
    cfg, model, _ = evaluated[0]
    state = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert cfg.INPUT.FORMAT == "RGB"
    del state["head.cls_score.bias"]
    torch.save({"model": state}, folder / "partial.pth")
    words = ("--config-file", plain, "MODEL.WEIGHTS", str(folder / "partial.pth"))
    with pytest.raises(ConfigError, match=r"lacks 1 .*head\.cls_score\.bias"):
        evaluate_teacher(*words)


def test_evaluation_of_the_teacher_is_detectron2s_of_the_same_model(config, folder):
    """No stub: the numbers of the tool are those of evaluating the loaded model by hand."""
    from detectron2.data import build_detection_test_loader
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset

    report = evaluate_teacher("--config-file", config)
    cfg = load_config(str(folder / "teacher.yaml"))
    expected = inference_on_dataset(
        build_teacher(load_config(config)).model,
        build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]),
        COCOEvaluator(
            cfg.DATASETS.TEST[0], output_dir=str(folder / "by_hand"), use_fast_impl=False
        ),
    )
    for key in ("AP", "AP50", "AP75"):
        assert report["results"]["bbox"][key] == pytest.approx(expected["bbox"][key], abs=1e-6)
    ours, theirs = (
        json.loads((folder / place / "coco_instances_results.json").read_text())
        for place in ("out/teacher_evaluation/inference", "by_hand")
    )
    assert ours == theirs and len(ours) > 100
