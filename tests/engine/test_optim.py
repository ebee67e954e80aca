"""Parameter groups, optimizers of heads, and schedules follow the config."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from projects.kd import add_kd_config, head_node
from projects.kd.engine.optim import build_optimizations, main_clip
from projects.kd.errors import ConfigError


def block(*names):
    return nn.ModuleDict({name: nn.Conv2d(1, 1, 1) for name in names})


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 1), "norm": nn.BatchNorm2d(2)})
        self.my_backbone = nn.Conv2d(2, 2, 1)
        self.frozen = nn.Conv2d(2, 2, 1).requires_grad_(False)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapters = block("p3", "p4")
        self.encoder = nn.Linear(2, 2)
        self.decoder = nn.Linear(2, 2)

    def aux_parameters(self):
        return self.decoder.parameters()

    def aux_active(self, iteration):
        return iteration >= 5


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapter = nn.Conv2d(1, 1, 1)

    def aux_parameters(self):
        return ()


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Student()
        self.heads = nn.ModuleDict({"Own": Head(), "Mimic": Plain()})


def make_cfg(**overrides):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.OWN = head_node(weight=1.0, mask_padding=True)
    cfg.KD.OWN.OPTIMIZER = type(cfg)(
        {
            "NAME": "AdamW",
            "BASE_LR": 1e-4,
            "WEIGHT_DECAY": 0.5,
            "CLIP_NORM": 0.01,
            "LR_SCHEDULER_NAME": "WarmupCosineLR",
            "WARMUP_ITERS": 10,
        }
    )
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 1e-3
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.MAX_ITER = 100
    cfg.SOLVER.STEPS = (60,)
    cfg.SOLVER.WARMUP_ITERS = 0
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def rate_and_decay(optimizer):
    return {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_groups_follow_the_names():
    cfg = make_cfg(SOLVER__BACKBONE_MULTIPLIER=0.1, KD__ADAPTER__LR_FACTOR=5.0)
    model = Wrapper()
    optimizer = build_optimizations(cfg, model)["student"].optimizer
    settings = rate_and_decay(optimizer)
    student, own, mimic = model.student, model.heads["Own"], model.heads["Mimic"]
    assert settings[student.backbone["conv"].weight] == pytest.approx((0.01, 1e-3))
    assert settings[student.backbone["norm"].weight] == pytest.approx((0.01, 0.0))
    assert settings[student.my_backbone.weight] == pytest.approx((0.1, 1e-3))
    assert settings[own.adapters["p3"].weight] == pytest.approx((0.5, 1e-3))
    assert settings[mimic.adapter.bias] == pytest.approx((0.5, 1e-3))
    assert settings[own.encoder.weight] == pytest.approx((0.1, 1e-3))
    assert own.decoder.weight not in settings and student.frozen.weight not in settings
    assert len(optimizer.param_groups) == 4


def test_bias_factors_multiply_the_others():
    cfg = make_cfg(
        SOLVER__BACKBONE_MULTIPLIER=0.1, SOLVER__BIAS_LR_FACTOR=2.0, SOLVER__WEIGHT_DECAY_BIAS=0.7
    )
    model = Wrapper()
    settings = rate_and_decay(build_optimizations(cfg, model)["student"].optimizer)
    assert settings[model.student.backbone["conv"].bias] == pytest.approx((0.02, 0.7))
    assert settings[model.student.backbone["conv"].weight] == pytest.approx((0.01, 1e-3))


def test_aux_parameters_have_their_own_optimizer():
    model = Wrapper()
    optimizations = build_optimizations(make_cfg(), model)
    assert list(optimizations) == ["student", "Own"]
    own = optimizations["Own"]
    assert type(own.optimizer) is torch.optim.AdamW
    decoder = model.heads["Own"].decoder
    assert rate_and_decay(own.optimizer).keys() == {decoder.weight, decoder.bias}
    assert own.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert (own.clip.kind, own.clip.limit) == ("full_model", 0.01)
    assert not own.active(4) and own.active(5)
    assert optimizations["student"].active is None


def test_schedules_are_separate():
    optimizations = build_optimizations(make_cfg(), Wrapper())
    main, own = optimizations["student"], optimizations["Own"]
    rates = []
    for _ in range(100):
        rates.append((main.optimizer.param_groups[0]["lr"], own.optimizer.param_groups[0]["lr"]))
        for item in (main, own):
            item.optimizer.step()
            item.scheduler.step()
    assert rates[0] == pytest.approx((0.1, 1e-4 * 0.001))
    assert rates[5][1] < rates[10][1]
    assert rates[59][0] == pytest.approx(0.1) and rates[60][0] == pytest.approx(0.01)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.75)).item())
    assert rates[75][1] == pytest.approx(1e-4 * cosine)


def test_ordinary_training_has_the_groups_of_detectron2():
    from detectron2.solver import build_optimizer

    cfg = make_cfg()
    student = Student()
    ours = build_optimizations(cfg, student)
    assert list(ours) == ["student"]
    stock = rate_and_decay(build_optimizer(cfg, student))
    assert rate_and_decay(ours["student"].optimizer) == stock


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizer_by_name(name):
    optimizer = build_optimizations(make_cfg(SOLVER__OPTIMIZER=name), Wrapper())["student"]
    assert type(optimizer.optimizer) is getattr(torch.optim, name)


def test_wrong_settings_name_their_key():
    with pytest.raises(
        ConfigError, match="SOLVER.OPTIMIZER: 'Lion' is not one of SGD, AdamW, Adam"
    ):
        build_optimizations(make_cfg(SOLVER__OPTIMIZER="Lion"), Wrapper())
    with pytest.raises(ConfigError, match="KD.OWN.OPTIMIZER.NAME: 'Lion'"):
        build_optimizations(make_cfg(KD__OWN__OPTIMIZER__NAME="Lion"), Wrapper())
    cfg = make_cfg()
    del cfg.KD.OWN["OPTIMIZER"]
    with pytest.raises(ConfigError, match="KD.OWN.OPTIMIZER"):
        build_optimizations(cfg, Wrapper())
    with pytest.raises(ConfigError, match="FREEZE_AT"):
        build_optimizations(make_cfg(), Student().requires_grad_(False))


def test_clip_settings():
    cfg = make_cfg()
    assert main_clip(cfg) is None
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 7.0
    clip = main_clip(cfg)
    assert (clip.kind, clip.limit, clip.norm_type) == ("full_model", 7.0, 2.0)


def test_every_parameter_has_exactly_one_owner():
    model = Wrapper()
    foreign = nn.Parameter(torch.zeros(1))
    model.heads["Own"].aux_parameters = lambda: [foreign]
    with pytest.raises(AssertionError, match="differ"):
        build_optimizations(make_cfg(), model)
    model = Wrapper()
    model.heads["Again"] = model.heads["Own"]
    cfg = make_cfg()
    cfg.KD.AGAIN = cfg.KD.OWN.clone()
    with pytest.raises(AssertionError, match="in 'Own' and in 'Again'"):
        build_optimizations(cfg, model)
