"""kd-visualize pull: the gradient of a head's losses, cell by cell."""

from __future__ import annotations

import kd_models
import pytest
import torch
from detectron2.utils.events import EventStorage

from projects.kd.commands.visualize.pull import draw, pulls


@pytest.fixture
def model(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    cfg = kd_models.distill_cfg(teacher, heads=("Mimic", "CWD"))
    cfg.KD.CWD.LEVELS = ("p3",)
    return kd_models.build_wrapper(cfg)


def test_is_the_gradient_of_the_loss(model, tmp_path):
    example = kd_models.make_batch(sizes=((64, 96),))[0]
    found = pulls(model, example, iteration=0)
    with EventStorage(0), torch.no_grad():
        ctx, _ = model.observe([example])
    levels = model.heads["Mimic"].levels
    assert len(found["Mimic"]) == len(levels) and len(found["CWD"]) == 1
    for level, norm in zip(levels, found["Mimic"], strict=True):
        if level == "p6":
            continue  # p7 is made of it, so that its gradient arrives here too
        student, teacher = ctx.student_features[level], ctx.teacher_features[level]
        rows, columns = (-(-side // ctx.stride(level)) for side in (64, 96))
        difference = (student - teacher)[0, :, :rows, :columns]
        # Mimic: mean over levels of the mean of squares over valid cells and channels
        gradient = 2 * difference / difference.numel() / len(levels)
        assert torch.allclose(norm, gradient.norm(dim=0), rtol=1e-4, atol=1e-9), level
    path = tmp_path / "new" / "pull.png"
    draw(str(path), torch.zeros(64, 96, 3), example["instances"].gt_boxes.tensor, found)
    assert path.stat().st_size > 1000
