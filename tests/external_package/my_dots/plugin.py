"""What KD.IMPORTS names: the detector's taps and config, a head of one's own, and a data set."""

from projects.kd import (
    IMITATION_HEAD_REGISTRY,
    ImitationHead,
    TapSpec,
    head_node,
    register_config,
    register_detector,
)

from . import data  # noqa: F401  (registers dots)
from .dot import add_dot_config


def run_head(model, features):
    for level in features.values():
        model.head(level)


# the head runs once a level: every_call keeps the whole list
register_detector(
    "DotDetector",
    taps={
        "features": TapSpec("backbone"),
        "scores": TapSpec("head", run=run_head, every_call=True),
    },
    class_key="MODEL.DOT.NUM_CLASSES",
)


@register_config
def add_config(cfg):
    add_dot_config(cfg)
    cfg.KD.SCOREMATCH = head_node(weight=2.0, mask_padding=False)
    cfg.KD.SCOREMATCH.POWER = 1.0


@IMITATION_HEAD_REGISTRY.register()
class ScoreMatch(ImitationHead):
    """Mean |sigmoid(student) - sigmoid(teacher)|^power, summed over levels."""

    requires = frozenset({"features", "scores"})

    def __init__(self, *, power, **base):
        super().__init__(**base)
        self.power = power

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "power": cfg.KD.SCOREMATCH.POWER}

    def forward(self, ctx):
        pairs = zip(ctx.student_outputs["scores"], ctx.teacher_outputs["scores"], strict=True)
        total = sum(
            (ours.float().sigmoid() - theirs.float().sigmoid()).abs().pow(self.power).mean()
            for ours, theirs in pairs
        )
        return {"loss_kd_score_match": self.weight * total}
