"""One training step: accumulation, clipping, idle optimizers, precision, refusing NaN, metrics."""

import re

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from projects.kd.engine.loop import TrainLoop
from projects.kd.engine.optim import GradientClip
from projects.kd.errors import ConfigError, TrainingError


class Toy(nn.Module):
    """Two linear layers; the loss of a batch (n, 4) is a mean over it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3, dtype=dtype)
        self.second = nn.Linear(3, 2, dtype=dtype)
        self.calls = 0
        self.seen_dtype = None

    def forward(self, batch):
        self.calls += 1
        hidden = self.first(batch)
        self.seen_dtype = hidden.dtype
        out = self.second(hidden.tanh())
        return {"loss_a": out.square().mean(), "loss_b": out.abs().mean() * 0.5}


def batches(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 4, generator=generator, dtype=dtype)
    while True:
        yield from data.split(size)


def make_loop(model, data, lr=0.1, **kwargs):
    optimizers = {
        "first": torch.optim.SGD(model.first.parameters(), lr=lr, momentum=0.9),
        "second": torch.optim.AdamW(model.second.parameters(), lr=lr, weight_decay=0.1),
    }
    return TrainLoop(model, data, optimizers, **kwargs)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(loop, steps):
    with EventStorage(loop.iter) as storage:
        for iteration in range(loop.iter, loop.iter + steps):
            loop.iter = storage.iter = iteration
            loop.run_step()
        loop.iter = iteration + 1
        return storage


def test_accumulation_equals_the_big_batch():
    big, small = Toy(torch.float64), Toy(torch.float64)
    run(make_loop(big, batches(8, torch.float64)), 3)
    run(make_loop(small, batches(2, torch.float64), accum_steps=4), 3)
    assert small.calls == 12
    for name, value in weights(big).items():
        assert torch.allclose(value, small.state_dict()[name], rtol=0, atol=1e-13), name


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_clipping_touches_only_its_optimizer(kind):
    clipped, plain = Toy(), Toy()
    limit = 1e-3
    one = make_loop(clipped, batches(8), clips={"first": GradientClip(kind, limit)})
    run(one, 1)
    run(make_loop(plain, batches(8)), 1)

    expected = [p.grad.clone() for p in plain.first.parameters()]
    if kind == "value":
        expected = [g.clamp(-limit, limit) for g in expected]
    elif kind == "norm":
        expected = [g * limit / (g.norm() + 1e-6) for g in expected]
    else:
        total = torch.cat([g.flatten() for g in expected]).norm()
        expected = [g * limit / (total + 1e-6) for g in expected]
    for parameter, gradient in zip(clipped.first.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=1e-12)
    for ours, theirs in zip(clipped.second.parameters(), plain.second.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_clipping_leaves_small_gradients_alone(kind):
    clipped, plain = Toy(), Toy()
    run(make_loop(clipped, batches(8), clips={"first": GradientClip(kind, 1e3)}), 2)
    run(make_loop(plain, batches(8)), 2)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in weights(clipped).items())


def test_idle_optimizer_changes_nothing():
    model = Toy()
    loop = make_loop(model, batches(8), active={"second": lambda iteration: iteration >= 3})
    start = weights(model)
    run(loop, 3)
    assert not torch.equal(model.first.weight, start["first.weight"])
    assert torch.equal(model.second.weight, start["second.weight"])
    assert not loop.optimizers["second"].state
    run(loop, 1)
    assert not torch.equal(model.second.weight, start["second.weight"])
    after, state = weights(model), loop.optimizers["second"].state_dict()["state"][0]
    state = {key: value.clone() for key, value in state.items()}
    loop.active["second"] = lambda iteration: False
    run(loop, 2)  # momentum and weight decay must not move it either
    assert torch.equal(model.second.weight, after["second.weight"])
    now = loop.optimizers["second"].state_dict()["state"][0]
    assert all(torch.equal(value, now[key]) for key, value in state.items())


class BadLoss(Toy):
    """From the given call on, one loss is not finite."""

    def __init__(self, value, call):
        super().__init__()
        self.value, self.call = value, call

    def forward(self, batch):
        losses = super().forward(batch)
        if self.calls >= self.call:
            losses["loss_b"] = losses["loss_b"] * self.value
        return losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_non_finite_loss_stops_before_the_step(value, accum_steps):
    model = BadLoss(value, 2 * accum_steps + 1)
    loop = make_loop(
        model, batches(8), accum_steps=accum_steps, last_checkpoint=lambda: "output/model_7.pth"
    )
    run(loop, 2)
    before = weights(model)
    with pytest.raises(TrainingError) as caught:
        run(loop, 1)
    assert isinstance(caught.value, FloatingPointError)
    message = str(caught.value)
    assert re.search(rf"iteration 2: not finite: loss_b={value}", message)
    assert "finite: loss_a=0." in message and "output/model_7.pth" in message
    assert "\n" not in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class BadGradient(Toy):
    """A finite loss whose gradient is not: the square root at zero."""

    def forward(self, batch):
        return {"loss": (self.first.weight * 0.0).sqrt().sum() + super().forward(batch)["loss_a"]}


def test_non_finite_gradient_stops_before_the_step():
    model = BadGradient()
    before = weights(model)
    with pytest.raises(TrainingError, match=r"gradient norm \(first\)=nan.*loss=0\."):
        run(make_loop(model, batches(8)), 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_diverged_proposals_are_a_user_error():
    class Diverged(Toy):
        def forward(self, batch):
            raise FloatingPointError("Predicted boxes contain Inf.")

    with pytest.raises(TrainingError, match="iteration 0: Predicted boxes contain Inf"):
        run(make_loop(Diverged(), batches(8)), 1)


def test_bfloat16_computes_in_half_and_keeps_fp32_weights():
    model, full = Toy(), Toy()
    run(make_loop(model, batches(8), amp_dtype=torch.bfloat16), 2)
    run(make_loop(full, batches(8)), 2)
    assert model.seen_dtype == torch.bfloat16 and full.seen_dtype == torch.float32
    assert model.first.weight.dtype == torch.float32
    assert not torch.equal(model.first.weight, full.first.weight)
    assert torch.allclose(model.first.weight, full.first.weight, atol=2e-2)


class Overflow(Toy):
    """A finite loss whose gradient leaves the range of float16 once it is scaled."""

    def forward(self, batch):
        return {"loss": self.first(batch).float().mean() * 10.0}


def test_float16_scales_skips_overflows_and_still_refuses_nan():
    model = Toy()
    loop = make_loop(model, batches(8), amp_dtype=torch.float16, gather_period=1)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = weights(model)
    storage = run(loop, 2)
    assert model.seen_dtype == torch.float16
    assert not torch.equal(model.first.weight, start["first.weight"])
    assert storage.history("grad_scale").latest() == 1024.0

    model = Overflow()
    loop = TrainLoop(
        model,
        batches(8),
        {"first": torch.optim.SGD(model.first.parameters(), lr=0.1)},
        amp_dtype=torch.float16,
    )
    start = weights(model)
    run(loop, 1)  # 65536 * 10 / 3 does not fit: no step, half the scale, no error
    assert torch.equal(model.first.weight, start["first.weight"])
    assert loop.scaler.get_scale() == 32768.0

    model = BadLoss(float("nan"), 1)
    start = weights(model)
    with pytest.raises(TrainingError, match="loss_b=nan"):
        run(make_loop(model, batches(8), amp_dtype=torch.float16), 1)
    assert torch.equal(model.first.weight, start["first.weight"])


def test_metrics_wait_for_the_period_and_keep_their_iteration():
    model = Toy()
    loop = make_loop(model, batches(8), gather_period=4)
    expected = []
    forward = model.forward

    def watched(batch):
        losses = forward(batch)
        expected.append(losses["loss_a"].item())
        return losses

    model.forward = watched
    with EventStorage(0) as storage:
        for iteration in range(5):
            loop.iter = storage.iter = iteration
            loop.run_step()
            if iteration < 3:
                assert "loss_a" not in storage.histories()
        history = storage.history("loss_a").values()
    assert [iteration for _, iteration in history] == [0, 1, 2, 3]
    assert [value for value, _ in history] == expected[:4]
    totals = [value for value, _ in storage.history("total_loss").values()]
    parts = [value for value, _ in storage.history("loss_b").values()]
    assert totals == pytest.approx([a + b for a, b in zip(expected, parts, strict=False)])


def test_metrics_average_the_micro_steps():
    model = Toy()
    loop = make_loop(model, batches(2), accum_steps=4, gather_period=1, lr=0.0)
    storage = run(loop, 1)
    data = next(batches(8))
    losses = [model(part)["loss_a"].item() for part in data.split(2)]
    assert storage.history("loss_a").latest() == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_steps_read_one_number_from_the_device(monkeypatch):
    loop = make_loop(Toy(), batches(8), gather_period=100)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, f=original, n=name: (reads.append(n), f(t))[1]
        )
    loop.optimizers["second"] = torch.optim.SGD(loop.model.second.parameters(), lr=0.1)
    run(loop, 3)  # AdamW on a CPU reads its step counter; SGD reads nothing
    assert len(reads) == 3


def test_state_continues_bit_for_bit(tmp_path):
    straight = Toy()
    loop = make_loop(straight, batches(8))
    run(loop, 6)

    broken = Toy()
    first = make_loop(broken, batches(8))
    run(first, 3)
    with EventStorage(3):
        torch.save({"loop": first.state_dict(), "model": broken.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed = Toy()
    resumed.load_state_dict(saved["model"])
    data = batches(8)
    for _ in range(3):
        next(data)
    second = make_loop(resumed, data)
    second.load_state_dict(saved["loop"])
    storage = run(second, 3)
    assert all(torch.equal(v, straight.state_dict()[k]) for k, v in resumed.state_dict().items())
    # the writers' medians reach back over the interruption
    assert [i for _, i in storage.history("total_loss").values()] == [0, 1, 2]


def test_other_optimizers_in_the_checkpoint_are_refused():
    model = Toy()
    loop = make_loop(model, batches(8))
    with EventStorage(0):
        state = loop.state_dict()
    one = TrainLoop(model, None, {"first": torch.optim.SGD(model.parameters(), lr=0.1)})
    with pytest.raises(ConfigError, match="KD.HEADS has changed"):
        one.load_state_dict(state)
    state["optimizers"].pop("second")
    with pytest.raises(ConfigError, match="parameter groups of optimizer 'first'"):
        one.load_state_dict(state)
