"""kd-calibrate on a tiny pair of detectors and a data set on the disk."""

import json
from types import SimpleNamespace

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage

from projects.kd import ConfigError, build_training_model, load_config
from projects.kd.commands import calibrate as calibration
from projects.kd.data.loader import build_train_loader
from projects.kd.data.register import register_configured


def calibrate(*words):
    return calibration.main(calibration.parse_arguments([str(word) for word in words]))


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
