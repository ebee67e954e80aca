"""The assistant as a detector: at its start it is the student; the tool compares the two."""

from __future__ import annotations

import json
import logging

import kd_models
import pytest
import torch
import toy_data
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json

from projects.kd.analysis.assistant import AssistantDetector, build_assistant, judge
from projects.kd.commands.evaluate import PARTS
from projects.kd.errors import ConfigError

NAME = "noise_assistant"
SETTINGS = {"KD__CSA__DIM": 16, "KD__CSA__HEADS": 4, "SOLVER__MAX_ITER": 90}
ARCHS = ["RetinaNet", "GeneralizedRCNN"]


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_at_its_start_it_detects_what_the_student_does(arch, scale, tmp_path):
    files = kd_models.write_teacher(tmp_path, kd_models.tiny_cfg(arch))
    cfg = kd_models.distill_cfg(files, arch, ("CSA",), KD__TEACHER__INPUT_SCALE=scale, **SETTINGS)
    wrapper = kd_models.build_wrapper(cfg).eval()
    assistant = AssistantDetector(wrapper).eval()
    (example,) = kd_models.make_batch(((128, 128),), teacher_scale=scale)
    example["height"], example["width"] = 256, 200
    with torch.no_grad():
        (ours,), (theirs,) = assistant([example]), wrapper.student([example])
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) == len(theirs) > 0 and ours.image_size == (256, 200)
        for key in ("scores", "pred_classes"):
            assert torch.equal(ours.get(key), theirs.get(key))
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.nn.init.normal_(wrapper.heads["CSA"].attention.output.weight)
        (other,) = assistant([example])
    scores = other["instances"].scores
    assert scores.shape != ours.scores.shape or not torch.allclose(scores, ours.scores)


def test_the_verdict(caplog):
    results = [{"bbox": {"AP": x}} for x in (20.0, 30.0)]
    with caplog.at_level(logging.INFO):
        assert judge(results[1], results[0]) == "assistant 30.00 AP, student 20.00 AP"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    for worse in (results[0], results[1]):
        caplog.clear()
        judge(worse, results[1])
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "pointless" in record.getMessage()
    several = [{"a": results[0], "b": results[1]}, {"a": results[0], "b": results[0]}]
    assert judge(*several) == "assistant 25.00 AP, student 20.00 AP"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config file, checkpoint) of a run with an assistant that saw nothing yet."""
    folder = tmp_path_factory.mktemp("run")
    toy_data.register_noise(folder, NAME, 4)
    convert_to_coco_json(NAME, str(folder / "noise.json"))
    MetadataCatalog.get(NAME).set(evaluator_type="coco", json_file=str(folder / "noise.json"))
    backbone = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}
    files = kd_models.write_teacher(folder, kd_models.tiny_cfg(**backbone))
    cfg = kd_models.distill_cfg(
        files,
        heads=("CSA",),
        **{**backbone, **SETTINGS, "DATASETS__TRAIN": (NAME,), "DATASETS__TEST": (NAME,)},
        KD__TEACHER__INPUT_SCALE=2.0,
        OUTPUT_DIR=str(folder / "out"),
    )
    wrapper = kd_models.build_wrapper(cfg)
    checkpoint = folder / "model_final.pth"
    state = {"model": wrapper.student.state_dict(), "distill": wrapper.heads.state_dict()}
    torch.save(state, checkpoint)
    torch.save({"model": state["model"]}, folder / "student.pth")
    return kd_models.write_config(cfg, folder / "student.yaml"), checkpoint


def evaluate(config, *words):
    return PARTS.call(["assistant", "--config-file", config, *words])


def test_the_tool_compares_assistant_and_student(run):
    """With images of both sizes, read from files."""
    config, checkpoint = run
    report = evaluate(config, "MODEL.WEIGHTS", str(checkpoint))
    ours, theirs = (report["results"][x]["bbox"]["AP"] for x in ("assistant", "student"))
    assert ours >= 0 and theirs >= 0
    assert report["verdict"] == f"assistant {ours:.2f} AP, student {theirs:.2f} AP"
    folder = checkpoint.parent / "out" / "assistant_evaluation"
    assert json.loads((folder / "metrics.json").read_text())["verdict"] == report["verdict"]
    assert all((folder / x / "inference").is_dir() for x in ("assistant", "student"))


def test_what_it_cannot_evaluate(run, tmp_path):
    config, checkpoint = run
    with pytest.raises(ConfigError, match=r"^MODEL\.WEIGHTS is empty"):
        evaluate(config)
    student = str(checkpoint.parent / "student.pth")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS: .*no student with its imitation heads"):
        evaluate(config, "MODEL.WEIGHTS", student)
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS: the heads .* not those of KD\.HEADS"):
        evaluate(config, "MODEL.WEIGHTS", str(checkpoint), "KD.CSA.DIM", "32")
    with pytest.raises(ConfigError, match=r"KD\.HEADS: --assistant needs"):
        evaluate(config, "MODEL.WEIGHTS", student, "KD.HEADS", "('Mimic',)")
    cfg = kd_models.tiny_cfg()
    with pytest.raises(ConfigError, match=r"KD\.HEADS: --assistant needs"):
        build_assistant(cfg)
