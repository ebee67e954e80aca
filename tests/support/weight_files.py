"""A small model, and what a file of weights makes of it."""

import torch
from torch import nn

from projects.kd.errors import ConfigError
from projects.kd.weights.loading import load_detector

KEY = "MODEL.WEIGHTS"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.ModuleDict({"cls": nn.Linear(2, 3), "box": nn.Linear(2, 4)})
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))


def random_state(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.ones_like(value)
        for name, value in Small().state_dict().items()
    }


def loaded(path, key=KEY):
    """What a fresh model holds after reading a file, or the one line that says why it does not."""
    model = Small()
    try:
        missing = load_detector(model, str(path), key)
    except ConfigError as error:
        assert str(error).startswith(f"{key}: ") and "\n" not in str(error)
        assert len(str(error)) < 600
        return str(error)
    assert missing == []
    return model.state_dict()
