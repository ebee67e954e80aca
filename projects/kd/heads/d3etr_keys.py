"""The keys of D3ETR, and what is refused of them."""

from __future__ import annotations

from detectron2.config import CfgNode

from ..config import head_node, register_config
from ..context import ModelInfo
from ..errors import ConfigError, require_one_of
from ..functional.d3etr import CLASS_COSTS, QUERY_WEIGHTS, prediction_loss
from ..functional.kd_detr import LAWS, kd_detr_loss

LAYERS = ("layer_map", "last")
PRED_FORMS = {"d3etr": prediction_loss, "kd_detr": kd_detr_loss}
ASSIGN_LAYERS = ("last", "all")


@register_config
def add_d3etr_config(cfg) -> None:
    """Add KD.D3ETR."""
    # MASK_PADDING and LEVELS stay as they are: the decoder reads one level and masks its padding
    cfg.KD.D3ETR = node = head_node(weight=1.0, mask_padding=True)
    # Adaptive matching: in every layer the student's queries are paired with the teacher's.
    node.ADAPTIVE = True
    # Fixed matching: the teacher's queries are a second group in the student's decoder (training
    # only); output j belongs to the teacher's output j.
    node.FIXED = True
    # Number of random queries. Each step draws new ones, and both sides decode them from their own
    # memories; output j belongs to output j. KD-DETR has 300. 0 = no such group.
    node.RANDOM = 0
    # What they are drawn from: "teacher" = with mean and deviation of the teacher's queries, number
    # by number; "normal" = N(0, 1).
    node.RANDOM_LAW = "teacher"
    # The teacher's layer that each layer of the student is compared with: "layer_map" = even steps,
    # the last to the last; "last" = its last one, as in KD-DETR.
    node.LAYERS = "layer_map"
    node.MATCH = match = CfgNode()
    # Class term of the cost: "soft_bce" or "focal_hard" (with CLASS_WEIGHT 2, as the detector's).
    match.CLASS_COST = "soft_bce"
    match.CLASS_WEIGHT = 1.0
    match.L1_WEIGHT = 5.0
    match.GIOU_WEIGHT = 2.0
    # Adaptive matching takes the teacher's queries with the highest scores only; 0 = all.
    match.TOPK = 100
    node.LOSS = loss = CfgNode()
    # Form of the prediction term: "d3etr" (ours), or "kd_detr": as published for KD-DETR.
    node.PRED_FORM = "d3etr"
    # Factors of the three terms; a term with factor 0 is not computed.
    loss.PRED = 1.0
    loss.SELF = 1.0
    loss.CROSS = 1.0
    # Parts of the prediction term.
    loss.CLASS = 1.0
    loss.L1 = 5.0
    loss.GIOU = 2.0
    # Weight of a pair in the prediction term: "teacher_max_prob" or "uniform".
    node.QUERY_WEIGHT = "teacher_max_prob"
    # Detection loss of the second group: its factor, and the decoder layers in which the teacher
    # says which query finds which object ("last" or "all"); others match by themselves.
    node.AUX_DET_WEIGHT = 1.0
    node.AUX_ASSIGN_LAYERS = "last"


def check_node(cfg, student: ModelInfo, teacher: ModelInfo) -> None:
    """Raise ConfigError for keys that do not fit, alone, together or with the two detectors."""
    node = cfg.KD.D3ETR
    if node.RANDOM < 0:
        raise ConfigError(f"KD.D3ETR.RANDOM is {node.RANDOM}, it must not be negative")
    if not (node.ADAPTIVE or node.FIXED or node.RANDOM):
        raise ConfigError(
            "KD.D3ETR: ADAPTIVE and FIXED are both False and RANDOM is 0, so nothing is distilled"
        )
    for key, value, allowed in (
        ("MATCH.CLASS_COST", node.MATCH.CLASS_COST, CLASS_COSTS),
        ("QUERY_WEIGHT", node.QUERY_WEIGHT, QUERY_WEIGHTS),
        ("RANDOM_LAW", node.RANDOM_LAW, LAWS),
        ("LAYERS", node.LAYERS, LAYERS),
        ("PRED_FORM", node.PRED_FORM, tuple(PRED_FORMS)),
        ("AUX_ASSIGN_LAYERS", node.AUX_ASSIGN_LAYERS, ASSIGN_LAYERS),
    ):
        require_one_of(f"KD.D3ETR.{key}", value, allowed)
    factors = {f"LOSS.{key}": value for key, value in node.LOSS.items()}
    factors |= {f"MATCH.{key}": node.MATCH[key] for key in node.MATCH if key != "CLASS_COST"}
    factors["AUX_DET_WEIGHT"] = node.AUX_DET_WEIGHT
    for key, value in factors.items():
        if value < 0:
            raise ConfigError(f"KD.D3ETR.{key} is {value}, it must not be negative")
    if not any((node.LOSS.PRED, node.LOSS.SELF, node.LOSS.CROSS)):
        raise ConfigError("KD.D3ETR.LOSS: PRED, SELF and CROSS are all 0")
    if node.RANDOM and not node.LOSS.PRED:
        raise ConfigError(
            "KD.D3ETR.LOSS.PRED is 0, and random queries have the prediction term only"
        )
    if node.LEVELS or not node.MASK_PADDING:
        key = "LEVELS" if node.LEVELS else "MASK_PADDING"
        raise ConfigError(
            f"KD.D3ETR.{key}: D3ETR reads the decoder, which sees one level and always masks its "
            "padding; leave the key as it is"
        )
    ours, theirs = student.model.num_classes, teacher.model.num_classes
    if teacher.classes().number(ours) != theirs:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE: D3ETR compares class by class, the teacher has {theirs} "
            f"classes and the student {ours}; match them by KD.TEACHER.CLASS_MAP"
        )
