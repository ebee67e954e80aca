"""Size and speed of deployed detectors: what is counted, on how many threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toy_data import register_noise

from projects.kd import load_config
from projects.kd.analysis import deployed


@pytest.fixture
def runs(tmp_path):
    register_noise(tmp_path, "deployed_noise", 6)
    opts = "MODEL.DEVICE cpu INPUT.MIN_SIZE_TEST 32 INPUT.MAX_SIZE_TEST 64".split()
    opts += ["MODEL.BACKBONE.NAME", "build_toy_fpn_backbone", "MODEL.RETINANET.NUM_CONVS", "1"]
    found = {}
    for channels in (8, 16):
        own = [*opts, "MODEL.FPN.OUT_CHANNELS", str(channels)]
        cfg = load_config("configs/shapes/retinanet_student.yaml", own)
        from detectron2.modeling import build_model

        weights = tmp_path / f"{channels}.pth"
        torch.save({"model": build_model(cfg).state_dict()}, weights)
        name = f"width {channels}"
        found[name] = SimpleNamespace(cfg=cfg, weights=str(weights), label=name)
    return found


def test_size_counts_bytes_and_times_are_taken_on_one_thread(runs, monkeypatch):
    threads = []

    def interleave(actions, device, *, rounds, warm_up):
        assert (device, rounds, warm_up) == ("cpu", deployed.ROUNDS, 1)
        for action in actions.values():
            action()
        threads.append(torch.get_num_threads())
        return {name: [9.0, 0.4, 0.2, 0.1, 0.4] for name in actions}

    monkeypatch.setattr(deployed, "interleave", interleave)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = deployed.measure_deployed(runs, "deployed_noise")
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for name, run in runs.items():
        state = torch.load(run.weights, weights_only=True)["model"]
        floats = sum(x.numel() for x in state.values() if x.is_floating_point())
        counters = sum(x.numel() for x in state.values() if x.dtype is torch.int64)
        assert found[name]["model_mb"] == round((4 * floats + 8 * counters) / 1e6, 3)
        assert found[name]["latency_ms"] == 100.0  # the median 0.4 s is of four images
    assert found["width 8"]["model_mb"] < found["width 16"]["model_mb"]
    assert deployed.measured_on(run) == "on 1 CPU thread"


def test_a_run_without_weights_is_left_out(runs):
    runs["width 8"].weights = "nowhere.pth"
    found = deployed.measure_deployed(runs, "deployed_noise")
    assert list(found) == ["width 16"] and found["width 16"]["latency_ms"] > 0
    assert deployed.measure_deployed({}, "deployed_noise") == {}
