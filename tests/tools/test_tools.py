"""The measuring tools, run on a tiny pair of detectors and a data set on the disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import kd_models
import numpy as np
import pytest
import torch
import toy_data  # noqa: F401  (registers the toy backbone)
from detectron2.utils.events import EventStorage
from PIL import Image

from projects.kd import ConfigError, build_teacher, build_training_model, load_config
from projects.kd.analysis.benchmark import Bench, loop_masks
from projects.kd.commands import calibrate as calibration
from projects.kd.commands.benchmark import PARTS as BENCHMARK
from projects.kd.commands.evaluate import PARTS as EVALUATE
from projects.kd.data.loader import build_train_loader
from projects.kd.data.register import register_configured

DATA = "kd_test_tools"
BACKBONE = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}


def calibrate(*words):
    return calibration.main(calibration.parse_arguments([str(word) for word in words]))


def evaluate_teacher(*words):
    return EVALUATE.call(["teacher", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
def data(folder):
    """A KD.DATASETS entry of six images with two objects each."""
    random = np.random.RandomState(0)
    images, annotations = [], []
    for i in range(6):
        pixels = random.randint(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        for k in range(2):
            item = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + (i + k) % 3}
            annotations.append(item | {"bbox": [4 + 28 * k, 5 + i, 20, 24], "area": 480})
            annotations[-1]["iscrowd"] = 0
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate("abc")]
    path = folder / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return [[DATA, str(path), str(folder)]]


def settings(data, folder) -> dict:
    return {
        **BACKBONE,
        "KD__DATASETS": data,
        "DATASETS__TRAIN": (DATA,),
        "DATASETS__TEST": (DATA,),
        "INPUT__MIN_SIZE_TRAIN": (48,),
        "SOLVER__IMS_PER_BATCH": 2,
        "SEED": 3,
        "OUTPUT_DIR": str(folder / "out"),
    }


@pytest.fixture(scope="module")
def config(folder, data):
    """Path of a distillation config with a teacher of its own input size and channel order."""
    teacher = kd_models.tiny_cfg(**settings(data, folder), INPUT__FORMAT="RGB")
    teacher.INPUT.MIN_SIZE_TEST, teacher.INPUT.MAX_SIZE_TEST = 96, 128
    files = kd_models.write_teacher(folder, teacher)
    cfg = kd_models.distill_cfg(
        files, heads=("Mimic", "FGFI", "CWD"), KD__START_ITER=5, **settings(data, folder)
    )
    cfg.KD.FGFI.WEIGHT, cfg.KD.CWD.WEIGHT = 0.25, 3.0
    return kd_models.write_config(cfg, folder / "student.yaml")


def test_calibrate_equals_gradients_of_a_backward_pass(config, folder, capsys):
    report = calibrate("--config-file", config, "--batches", 2, "--target", 0.25)
    assert json.loads((folder / "out" / "calibration.json").read_text()) == report

    cfg = load_config(config)
    register_configured(cfg)
    torch.manual_seed(3)
    model = build_training_model(cfg).train()
    kept = {}

    def keep(module, inputs, output):
        for value in output.values():
            value.retain_grad()
        kept.update(output)

    model.student.backbone.register_forward_hook(keep)
    loader = iter(build_train_loader(cfg, seed=3))
    losses, norms = [], []
    for _ in range(2):
        with EventStorage(5):  # the schedule is at 1
            found = model(next(loader))
        found["task"] = found["loss_cls"] + found["loss_box_reg"]
        values, gradients = {}, {}
        for name in ("task", "loss_kd_mimic", "loss_kd_fgfi", "loss_kd_cwd"):
            for feature in kept.values():
                feature.grad = None
            found[name].backward(retain_graph=True)
            parts = [x.grad.flatten() for x in kept.values() if x.grad is not None]
            values[name] = found[name].item()
            gradients[name] = torch.cat(parts).norm().item()
        losses.append(values)
        norms.append(gradients)

    def mean(a, b):  # the median of two
        return pytest.approx((a + b) / 2, rel=1e-4)

    everything = report["task_losses"]["all"]
    assert everything["loss"]["median"] == mean(*(x["task"] for x in losses))
    assert everything["gradient"]["median"] == mean(*(x["task"] for x in norms))
    assert everything["share"]["median"] == pytest.approx(1.0)
    for name, weight in (("Mimic", 1.0), ("FGFI", 0.25), ("CWD", 3.0)):
        entry, key = report["heads"][name], f"loss_kd_{name.lower()}"
        assert entry["weight"] == weight
        assert entry["weighted_loss"]["median"] == mean(*(x[key] for x in losses))
        assert entry["raw_loss"]["median"] == mean(*(x[key] / weight for x in losses))
        assert entry["gradient"]["median"] == mean(*(x[key] for x in norms))
        share = (norms[0][key] / norms[0]["task"] + norms[1][key] / norms[1]["task"]) / 2
        assert entry["share"]["median"] == pytest.approx(share, rel=1e-4)
        assert entry["suggested_weight"] == pytest.approx(weight * 0.25 / share, rel=1e-4)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("loss_box_reg", "FGFI", "suggested"))


def test_calibrate_names_heads_that_it_measures_with_random_modules():
    heads = torch.nn.ModuleDict({"CWD": torch.nn.Conv2d(1, 1, 1), "PKD": torch.nn.Identity()})
    text = calibration.untrained(SimpleNamespace(heads=heads))
    assert text.startswith("CWD: measured with random modules") and "KD.BALANCE" in text
    del heads["CWD"]
    assert calibration.untrained(SimpleNamespace(heads=heads)) == ""


def test_calibrate_at_the_suggested_weight_reaches_the_target(config):
    words = ("--config-file", config, "--batches", 1, "--target", 0.3)
    weight = calibrate(*words)["heads"]["CWD"]["suggested_weight"]
    entry = calibrate(*words, "KD.CWD.WEIGHT", weight)["heads"]["CWD"]
    assert entry["share"]["median"] == pytest.approx(0.3, rel=1e-4)
    assert entry["suggested_weight"] == pytest.approx(weight, rel=1e-4)
    zero = calibrate(*words, "KD.CWD.WEIGHT", 0.0)["heads"]["CWD"]
    assert zero["suggested_weight"] == pytest.approx(weight, rel=1e-4)
    assert zero["weighted_loss"]["median"] == 0.0 < zero["raw_loss"]["median"]


def test_calibrate_measures_heads_on_backbone_stages_there(config):
    """At the pyramid's levels SDF has no gradient at all."""
    words = ("--config-file", config, "--batches", 1, "--target", 0.3)
    words = (*words, "KD.HEADS", "('SDF',)", "KD.SDF.EMBED_DIM", 8)
    weight = calibrate(*words)["heads"]["SDF"]["suggested_weight"]
    entry = calibrate(*words, "KD.SDF.WEIGHT", weight)["heads"]["SDF"]
    assert weight > 0 and entry["share"]["median"] == pytest.approx(0.3, rel=1e-4)


def test_calibrate_shows_how_a_share_grows(config, folder, capsys):
    """Checkpoints of a run with their adapters; each as if it had been measured alone."""
    opts = ("KD.HEADS", "('CWD',)", "KD.ADAPTER.TYPE", "conv1x1")
    cfg = load_config(config, [*opts])
    files = []
    for seed in (1, 2):
        model = kd_models.build_wrapper(cfg, seed)
        files.append(str(folder / f"model_000000{seed}.pth"))
        state = {"model": model.student.state_dict(), "distill": model.heads.state_dict()}
        if seed == 2:  # what the task losses are divided by
            state["trainer"] = {"running": [{"student.loss_normalizer": 1000.0}]}
        torch.save(state, files[-1])
    words = ("--config-file", config, "--batches", 1)
    both = calibrate("--weights", *files, *words, *opts)["checkpoints"]
    assert [x["weights"] for x in both] == files
    header, _, line = capsys.readouterr().out.splitlines()[-4:-1]
    assert header.split() == ["share", "of", "task", "model_0000001", "model_0000002"]
    for file, report in zip(files, both, strict=True):
        (alone,) = calibrate("--weights", file, *words, *opts)["checkpoints"]
        assert alone["heads"] == report["heads"]
        share = report["heads"]["CWD"]["share"]
        assert f"{share['median']:.4g}" in line
    assert both[0]["heads"]["CWD"]["share"] != both[1]["heads"]["CWD"]["share"]
    at_rest = {**state, "trainer": {}}
    torch.save(at_rest, folder / "at_rest.pth")
    (other,) = calibrate("--weights", folder / "at_rest.pth", *words, *opts)["checkpoints"]
    ratio = (
        other["task_losses"]["all"]["loss"]["median"]
        / (both[1]["task_losses"]["all"]["loss"]["median"])
    )
    assert 5 < ratio < 12, "100 in place of 1000, moved by one batch"
    # a student alone has other adapters: not what the run had
    student = calibrate(*words, *opts, "MODEL.WEIGHTS", files[0])["heads"]["CWD"]["share"]
    assert student != both[0]["heads"]["CWD"]["share"]
    torch.save({"model": state["model"]}, folder / "student.pth")
    for file, line in (
        (folder / "student.pth", r"^--weights: .*no student with its imitation heads"),
        (folder / "none.pth", r"^--weights"),
    ):
        with pytest.raises(ConfigError, match=line) as error:
            calibrate("--weights", file, *words, *opts)
        assert "\n" not in str(error.value)


def test_calibrate_refuses_what_it_cannot_measure(config):
    with pytest.raises(ConfigError, match=r"KD\.META_ARCHITECTURE"):
        calibrate("--config-file", config, "KD.META_ARCHITECTURE", "")
    with pytest.raises(ConfigError, match="--batches"):
        calibrate("--config-file", config, "--batches", 0)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: no such file"):
        calibrate("--config-file", config, "MODEL.WEIGHTS", "/nowhere.pth")


@pytest.fixture
def evaluated(monkeypatch):
    """Calls of the evaluation: (config, model, folder)."""
    calls = []

    def evaluate(cfg, model, output_dir=None):
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
        build_detection_test_loader(cfg, DATA),
        COCOEvaluator(DATA, output_dir=str(folder / "by_hand"), use_fast_impl=False),
    )
    for key in ("AP", "AP50", "AP75"):
        assert report["results"]["bbox"][key] == pytest.approx(expected["bbox"][key], abs=1e-6)
    ours, theirs = (
        json.loads((folder / place / "coco_instances_results.json").read_text())
        for place in ("out/teacher_evaluation/inference", "by_hand")
    )
    assert ours == theirs and len(ours) > 100


def test_benchmark_measures_every_part(config, folder, capsys):
    path = folder / "bench.json"
    report = BENCHMARK.call(
        [
            *("all", "--config-file", config, "--size", "64x96", "--boxes", 3, "--rounds", 2),
            *("--memory", "--memory-size", "64x64", "--mask-size", "60x90", "--mask-boxes", 7),
            *("--output", path),
        ]
    )
    saved = json.loads(path.read_text())
    assert saved["protocol"]["size"] == [64, 96] and saved["protocol"]["rounds"] == 2
    result = saved["results"]["student"]
    assert result == report["results"]["student"]
    assert set(result) == {"data", "teacher", "student", "heads", "step", "mask", "memory"}
    together = "Mimic+FGFI+CWD"
    assert set(result["heads"]) == {"Mimic", "FGFI", "CWD"}
    assert set(result["step"]) == {"Mimic", "FGFI", "CWD", together}
    for entry in result["step"].values():
        assert set(entry) == {"seconds", "base", "ratio"}
        assert entry["ratio"]["low"] <= entry["ratio"]["median"] <= entry["ratio"]["high"]
    assert result["mask"]["cells_that_differ_from_the_fp32_loop"] <= 1
    memory = result["memory"]
    assert memory["teacher"] < memory["base step"] <= memory[f"step with {together}"]
    assert all(value > 0 for value in memory.values())
    printed = capsys.readouterr().out
    assert f"step with {together}" in printed and "loop over boxes" in printed


def test_benchmark_times_the_same_number_of_steps_of_both_sides(config, monkeypatch):
    built, steps = [], []
    init = Bench.__init__

    def count(bench, cfg, heads, *args, **kwargs):
        init(bench, cfg, heads, *args, **kwargs)
        built.append(tuple(heads))
        steps.clear()
        bench.model.student.register_forward_hook(lambda *_: steps.append("student"))
        bench.model.teacher.model.backbone.register_forward_hook(lambda *_: steps.append("teacher"))

    monkeypatch.setattr(Bench, "__init__", count)
    words = ["step", "--config-file", config, "--heads", "CWD"]
    BENCHMARK.call([*words, "--size", "64x64", "--boxes", "2", "--rounds", "3"])
    assert built == [("CWD",)]
    # three warm-ups and three rounds of base and whole, each with one pass of both networks
    assert steps.count("student") == steps.count("teacher") == 12


def test_benchmark_steps_train_what_they_should(config):
    cfg = load_config(config)
    cfg.KD.START_ITER = 0
    with EventStorage(1):
        bench = Bench(cfg, ("CWD", "FGFI"), (64, 96), 3)
        heads = [p.clone() for p in bench.model.heads.parameters()]
        student = bench.model.student.head.cls_score.weight.clone()
        bench.base()()
        assert not torch.equal(student, bench.model.student.head.cls_score.weight)
        assert all(map(torch.equal, heads, bench.model.heads.parameters()))
        whole = bench.step(bench.model)
        whole()
        trained = [
            not torch.equal(a, b)
            for a, b in zip(heads, bench.model.heads.parameters(), strict=True)
        ]
        assert any(trained)
        assert bench.model.student.head.cls_score.weight.grad is not None
        whole.clear()
        assert all(p.grad is None for p in bench.model.parameters())
        before = [p.clone() for p in bench.model.parameters()]
        bench.head("FGFI")()
        assert all(map(torch.equal, before, bench.model.parameters()))
        assert all(p.grad is None for p in bench.model.parameters())


def test_the_loop_over_boxes_selects_what_the_head_selects(config):
    with EventStorage(1):
        bench = Bench(load_config(config), ("FGFI",), (90, 120), 20)
    head = bench.model.heads["FGFI"]
    for head.per_level in (False, True):
        ours = list(head.masks(bench.ctx).values())
        loop = loop_masks(head, bench.ctx)
        assert [x.shape for x in ours] == [x.shape for x in loop]
        assert sum(int(x.sum()) for x in loop) > 10
        assert (
            sum(int((a != b).sum()) for a, b in zip(ours, loop, strict=True)) <= 1
        )  # fp32 against fp64


def test_benchmark_refuses_what_it_cannot_measure(config):
    words = ["step", "--config-file", config]
    with pytest.raises(ConfigError, match="KD.HEADS: no imitation head 'CDW'"):
        BENCHMARK.call([*words, "--heads", "CDW"])
    with pytest.raises(ConfigError, match=r"KD\.META_ARCHITECTURE of student is empty"):
        BENCHMARK.call([*words, "KD.META_ARCHITECTURE", ""])
    with pytest.raises(ConfigError, match="data: needs --config-file"):
        BENCHMARK.call(["data"])
    with pytest.raises(ConfigError, match="nothing to measure"):
        BENCHMARK.call(["mask", *words[1:], "--heads", "CWD"])
