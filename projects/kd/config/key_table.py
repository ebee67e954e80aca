"""The values that each config key takes, detectron2's and ours, in one table.

Keys of a head's own node come by their last names, so that heads of other packages are checked too.
What only several keys together tell is in :mod:`.key_checks`.
"""

from __future__ import annotations

import functools

from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from ..adapters import ADAPTER_TYPES
from .defaults import DTYPES, INHERIT, PROPORTIONAL
from .rules import (
    COUNT,
    FLAG,
    FRACTION,
    LEVELS,
    NAME,
    NAMES,
    POSITIVE,
    SOME_LEVELS,
    TEXT,
    WEIGHT,
    Rule,
    above,
    either,
    entry,
    levelled,
    listed,
    number,
    one_of,
    registered,
    share,
    whole,
)
from .teachers import GROUP, common_key

OPTIMIZERS = ("SGD", "AdamW", "Adam")
SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR")
CLIP_TYPES = ("value", "norm", "full_model")
SAMPLERS = (
    "TrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)
# The formats of detectron2's reader that give one or three channels in 0..255.
FORMATS = ("BGR", "RGB", "L", "YUV-BT.601", "HSV", "YCbCr")
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")

_DILATION = one_of(1, 2)
_STRIDE = one_of(8, 16, 32)
_SCALES = listed(POSITIVE, 4, 5)
_THRESHOLDS = listed(FRACTION, 1, rising=True)
_LABELS = listed(one_of(-1, 0, 1), 2)
_CLASS = Rule(lambda x: NAME.test(x) or whole().test(x), "the name or the number of a class")

# Last names of keys that mean the same wherever they stand below MODEL.
_OF_MODELS = {
    "NORM": one_of(*_NORMS),
    "NUM_CLASSES": COUNT,
    "IN_FEATURES": SOME_LEVELS,
    "OUT_FEATURES": SOME_LEVELS,
    "POOLER_TYPE": one_of(*_POOLERS),
    "POOLER_RESOLUTION": COUNT,
    "POOLER_SAMPLING_RATIO": whole(),
    "BBOX_REG_LOSS_TYPE": one_of(*_BOX_LOSSES),
    "BBOX_REG_WEIGHTS": _SCALES,
    "IOU_THRESHOLDS": _THRESHOLDS,
    "IOU_LABELS": _LABELS,
    "POSITIVE_FRACTION": FRACTION,
    "SCORE_THRESH_TEST": FRACTION,
    "NMS_THRESH_TEST": FRACTION,
    "NMS_THRESH": FRACTION,
    "PRIOR_PROB": above(0, 1),
    "FOCAL_LOSS_ALPHA": number(-1, 1),
    "FOCAL_LOSS_GAMMA": number(0),
    "SMOOTH_L1_BETA": number(0),
    "SMOOTH_L1_LOSS_BETA": number(0),
    "CONV_DIM": COUNT,
    "NUM_CONV": whole(),
    "NUM_CONVS": whole(),
    "NUM_FC": whole(),
    "FC_DIM": COUNT,
    "DROPOUT": share(),
    "ASPP_DROPOUT": share(),
    "TOPK_CANDIDATES_TEST": COUNT,
    "BATCH_SIZE_PER_IMAGE": COUNT,
}

# Last names of keys of a head's node (KD.<HEAD>).
_OF_HEADS = {
    "WEIGHT": WEIGHT,
    "LEVELS": LEVELS,
    "MASK_PADDING": FLAG,
    "START_ITER": either(whole(), INHERIT, PROPORTIONAL, words="-2 for KD's own"),
    "WARMUP_ITERS": either(whole(), INHERIT, PROPORTIONAL, words="-2 for KD's own"),
    "SHARE": either(number(0), float(INHERIT), words="-2.0 for KD.BALANCE.TARGET"),
    "END_ITER": whole(-2),
    "OPTIMIZER.NAME": one_of(*OPTIMIZERS),
    "OPTIMIZER.BASE_LR": POSITIVE,
    "OPTIMIZER.WEIGHT_DECAY": number(0),
    "OPTIMIZER.CLIP_NORM": number(0),
    "OPTIMIZER.LR_SCHEDULER_NAME": one_of("", *SCHEDULERS),
    "OPTIMIZER.WARMUP_ITERS": whole(),
}

_MODEL: dict[str, Rule] = {
    "META_ARCHITECTURE": NAME,
    "PIXEL_MEAN": listed(number(), 1),
    "PIXEL_STD": listed(POSITIVE, 1),
    "BACKBONE.NAME": registered(BACKBONE_REGISTRY),
    "BACKBONE.FREEZE_AT": whole(0, 5),
    "FPN.IN_FEATURES": LEVELS,
    "FPN.OUT_CHANNELS": COUNT,
    "FPN.FUSE_TYPE": one_of("sum", "avg"),
    "PROPOSAL_GENERATOR.NAME": registered(PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    "PROPOSAL_GENERATOR.MIN_SIZE": whole(),
    "ANCHOR_GENERATOR.NAME": registered(ANCHOR_GENERATOR_REGISTRY),
    "ANCHOR_GENERATOR.SIZES": levelled(POSITIVE, 1),
    "ANCHOR_GENERATOR.ASPECT_RATIOS": levelled(POSITIVE, 1),
    "ANCHOR_GENERATOR.ANGLES": levelled(number(), 1),
    "ANCHOR_GENERATOR.OFFSET": share(),
    "RPN.HEAD_NAME": registered(RPN_HEAD_REGISTRY),
    "RPN.BOUNDARY_THRESH": whole(-1),
    "RPN.BBOX_REG_LOSS_WEIGHT": WEIGHT,
    "RPN.LOSS_WEIGHT": WEIGHT,
    "RPN.PRE_NMS_TOPK_TRAIN": COUNT,
    "RPN.PRE_NMS_TOPK_TEST": COUNT,
    "RPN.POST_NMS_TOPK_TRAIN": COUNT,
    "RPN.POST_NMS_TOPK_TEST": COUNT,
    "RPN.CONV_DIMS": listed(either(COUNT, -1), 1),
    "ROI_HEADS.NAME": registered(ROI_HEADS_REGISTRY),
    "ROI_BOX_HEAD.NAME": registered(ROI_BOX_HEAD_REGISTRY, ""),
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": WEIGHT,
    "ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": number(0),
    "ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": COUNT,
    "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": listed(_SCALES, 1),
    "ROI_BOX_CASCADE_HEAD.IOUS": listed(FRACTION, 1),
    "ROI_MASK_HEAD.NAME": registered(ROI_MASK_HEAD_REGISTRY),
    "ROI_KEYPOINT_HEAD.NAME": registered(ROI_KEYPOINT_HEAD_REGISTRY),
    "ROI_KEYPOINT_HEAD.CONV_DIMS": listed(COUNT, 1),
    "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": COUNT,
    "ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": whole(),
    "ROI_KEYPOINT_HEAD.LOSS_WEIGHT": WEIGHT,
    "SEM_SEG_HEAD.NAME": registered(SEM_SEG_HEADS_REGISTRY),
    "SEM_SEG_HEAD.IGNORE_VALUE": whole(-255, 255),
    "SEM_SEG_HEAD.CONVS_DIM": COUNT,
    "SEM_SEG_HEAD.COMMON_STRIDE": one_of(1, 2, 4, 8, 16, 32),
    "SEM_SEG_HEAD.LOSS_WEIGHT": WEIGHT,
    "SEM_SEG_HEAD.LOSS_TYPE": one_of("cross_entropy", "hard_pixel_mining"),
    "SEM_SEG_HEAD.PROJECT_FEATURES": LEVELS,
    "SEM_SEG_HEAD.PROJECT_CHANNELS": listed(COUNT),
    "SEM_SEG_HEAD.ASPP_CHANNELS": COUNT,
    "SEM_SEG_HEAD.ASPP_DILATIONS": listed(COUNT, 3, 3),
    "SEM_SEG_HEAD.PSPNET.BINS": listed(COUNT, 1),
    "SEM_SEG_HEAD.PSPNET.AUX_FEATURE": TEXT,
    "SEM_SEG_HEAD.PSPNET.AUX_WEIGHT": WEIGHT,
    "PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": WEIGHT,
    "PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": FRACTION,
    "PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": number(0),
    "PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": FRACTION,
    "RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "RESNETS.NUM_GROUPS": COUNT,
    "RESNETS.WIDTH_PER_GROUP": COUNT,
    "RESNETS.RES4_DILATION": _DILATION,
    "RESNETS.RES5_DILATION": one_of(1, 2, 4),
    "RESNETS.RES5_MULTI_GRID": listed(COUNT, 3, 3),
    "RESNETS.RES2_OUT_CHANNELS": COUNT,
    "RESNETS.STEM_OUT_CHANNELS": COUNT,
    "RESNETS.STEM_TYPE": one_of("basic", "deeplab"),
    "RESNETS.DEFORM_ON_PER_STAGE": listed(FLAG, 4, 4),
    "RESNETS.DEFORM_NUM_GROUPS": COUNT,
    "RESNETS.OUTPUT_STRIDE": _STRIDE,
    "TIMM.NAME": TEXT,
    "TIMM.OUT_INDICES": listed(whole()),
    "TIMM.NORM": one_of("BN", "FrozenBN", "SyncBN"),
    "TIMM.FREEZE_AT": whole(0, 5),
    "TIMM.DROP_PATH": share(),
    "TIMM.OUTPUT_STRIDE": _STRIDE,
    "CONDITIONAL_DETR.IN_FEATURE": NAME,
    "CONDITIONAL_DETR.NUM_QUERIES": COUNT,
    "CONDITIONAL_DETR.HIDDEN_DIM": COUNT,
    "CONDITIONAL_DETR.NHEADS": COUNT,
    "CONDITIONAL_DETR.DIM_FEEDFORWARD": COUNT,
    "CONDITIONAL_DETR.ENC_LAYERS": whole(),
    "CONDITIONAL_DETR.DEC_LAYERS": COUNT,
    "CONDITIONAL_DETR.CLS_WEIGHT": WEIGHT,
    "CONDITIONAL_DETR.L1_WEIGHT": WEIGHT,
    "CONDITIONAL_DETR.GIOU_WEIGHT": WEIGHT,
    "FCOS.CENTER_SAMPLING_RADIUS": number(0),
    "GFL.REG_MAX": COUNT,
    "GFL.TOPK_ASSIGN": COUNT,
    "GFL.BETA": number(0),
    "GFL.GIOU_WEIGHT": WEIGHT,
    "GFL.DFL_WEIGHT": WEIGHT,
    "REPPOINTS.NUM_POINTS": COUNT,
    "REPPOINTS.TRANSFORM": one_of("moment", "minmax"),
    "REPPOINTS.GRADIENT_MUL": FRACTION,
    "REPPOINTS.INIT_WEIGHT": WEIGHT,
    "REPPOINTS.REFINE_WEIGHT": WEIGHT,
}

_REST: dict[str, Rule] = {
    "INPUT.MIN_SIZE_TRAIN": listed(whole(), 1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": whole(16),
    "INPUT.MIN_SIZE_TEST": whole(),
    "INPUT.MAX_SIZE_TEST": whole(16),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": listed(POSITIVE, 2, 2),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": number(0, 1),
    "INPUT.FORMAT": one_of(*FORMATS),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.DETR_CROP_RESIZE": listed(COUNT, 1),
    "INPUT.DETR_CROP_RANGE": listed(COUNT, 2, 2),
    "INPUT.IGNORED_REGIONS": one_of("paint", "keep"),
    "DATASETS.TRAIN": NAMES,
    "DATASETS.TEST": NAMES,
    "DATASETS.PROPOSAL_FILES_TRAIN": NAMES,
    "DATASETS.PROPOSAL_FILES_TEST": NAMES,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": COUNT,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": COUNT,
    "DATASETS.TRAIN_REPEAT_FACTOR": listed(entry(NAME, POSITIVE)),
    "DATALOADER.NUM_WORKERS": whole(0, 512),
    "DATALOADER.SAMPLER_TRAIN": one_of(*SAMPLERS),
    "DATALOADER.REPEAT_THRESHOLD": number(0),
    "DATALOADER.IMAGE_CHECK_SECONDS": number(0),
    "DATALOADER.RANDOM_SUBSET_RATIO": Rule(
        lambda x: above(0, 1).test(x) or x == 1.0, "a number above 0, up to 1"
    ),
    "SOLVER.OPTIMIZER": one_of(*OPTIMIZERS),
    "SOLVER.LR_SCHEDULER_NAME": one_of(*SCHEDULERS),
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": number(0),
    "SOLVER.MOMENTUM": share(),
    "SOLVER.WEIGHT_DECAY": number(0),
    "SOLVER.WEIGHT_DECAY_NORM": number(0),
    "SOLVER.WEIGHT_DECAY_BIAS": either(number(0), None),
    "SOLVER.BIAS_LR_FACTOR": number(0),
    "SOLVER.BACKBONE_MULTIPLIER": number(0),
    "SOLVER.GAMMA": POSITIVE,
    "SOLVER.STEPS": listed(COUNT, rising=True),
    "SOLVER.NUM_DECAYS": COUNT,
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.WARMUP_ITERS": whole(),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": whole(),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(*CLIP_TYPES),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": above(0, infinite=True),
    "SOLVER.AMP.DTYPE": one_of("auto", "float16", "bfloat16"),
    "SOLVER.CHANNELS_LAST": either(FLAG, None, words="None for a CPU only"),
    "SOLVER.ACCUM_STEPS": COUNT,
    "SOLVER.GATHER_METRIC_PERIOD": COUNT,
    "SOLVER.EMA.DECAY": share(),
    "SOLVER.KEEP_CHECKPOINTS": whole(),
    "SOLVER.POLY_LR_POWER": number(0),
    "SOLVER.POLY_LR_CONSTANT_ENDING": FRACTION,
    "TEST.EXPECTED_RESULTS": listed(entry(NAME, NAME, number(), number(0))),
    "TEST.EVAL_PERIOD": whole(),
    "TEST.BEST_METRIC": TEXT,
    "TEST.BEST_MODE": one_of("max", "min"),
    "TEST.PATIENCE": whole(),
    "TEST.IMS_PER_BATCH": COUNT,
    "TEST.PICTURES.PERIOD": whole(),
    "TEST.PICTURES.COUNT": COUNT,
    "WRITERS.NAMES": listed(one_of("wandb", "mlflow"), once=True),
    "WRITERS.PROJECT": NAME,
    "WRITERS.RUN": TEXT,
    "TEST.KEYPOINT_OKS_SIGMAS": listed(POSITIVE),
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.AUG.MIN_SIZES": listed(COUNT, 1),
    "TEST.AUG.MAX_SIZE": whole(16),
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
    "TEST.TILES.SIZE": COUNT,
    "TEST.TILES.OVERLAP": whole(),
    "TEST.TILES.NMS_THRESH": FRACTION,
    "TEST.QUICK.DTYPE": one_of(*DTYPES),
    "OUTPUT_DIR": NAME,
    "SEED": whole(-1, 2**31),
    "VIS_PERIOD": whole(),
    "KD.META_ARCHITECTURE": TEXT,
    "KD.HEADS": NAMES,
    "KD.IMPORTS": NAMES,
    "KD.LEVELS": LEVELS,
    "KD.LEVEL_MAP": listed(entry(NAME, NAME)),
    "KD.START_ITER": whole(),
    "KD.WARMUP_ITERS": whole(),
    "KD.END_ITER": whole(-1),
    "KD.INIT_FROM_TEACHER": listed(TEXT),
    "KD.LOG_PERIOD": COUNT,
    "KD.BALANCE.TARGET": number(0),
    "KD.BALANCE.END_TARGET": number(0),
    "KD.BALANCE.PERIOD": COUNT,
    "KD.BALANCE.EMA": share(),
    "KD.BALANCE.BOUND": number(1),
    "KD.TEACHER.INPUT_SCALE": POSITIVE,
    "KD.TEACHER.DTYPE": one_of("auto", *DTYPES),
    "KD.TEACHER.CHANNELS_LAST": either(FLAG, None, words="None for a CPU only"),
    "KD.TEACHER.FUSE": FLAG,
    "KD.TEACHER.CACHE": one_of("off", "ram", "disk"),
    "KD.TEACHER.CACHE_MB": COUNT,
    "KD.TEACHER.CLASS_MAP": either(listed(entry(_CLASS, _CLASS)), ["by_name"], words="by_name"),
    "KD.ADAPTER.TYPE": one_of(*ADAPTER_TYPES),
    "KD.ADAPTER.LR_FACTOR": number(0),
    "KD.SDF.WEIGHT": either(WEIGHT, -1.0, words="-1.0 for the preset's"),
    "KD.FGFI.ANCHOR_SIZES": levelled(POSITIVE),
    "KD.FGFI.ANCHOR_RATIOS": levelled(POSITIVE),
    "KD.ICD.NEGATIVES_PER_BOX": number(0),
    "KD.ICD.CONF_WEIGHT": WEIGHT,
    "KD.ICD.BOX_WEIGHT": WEIGHT,
}


def add_rule(key: str, rule: Rule) -> None:
    """Say what a key takes that is not in this table, where the key itself is added.

    Args:
        key: dotted, e.g. ``"TEST.VISDRONE_READINGS"``.
        rule: see :mod:`.rules`.
    """
    _REST[key] = rule
    rule_of.cache_clear()


@functools.cache
def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key; None where the key's type is all that is asked."""
    key = common_key(key)
    first, _, rest = key.partition(".")
    rule = _MODEL.get(rest) if first == "MODEL" else _REST.get(key)
    if rule is None and first == "MODEL":
        rule = _OF_MODELS.get(key.rpartition(".")[2])
    if rule is None and key.startswith(f"{GROUP}."):
        return WEIGHT if key.endswith(".WEIGHT") else rule
    if rule is None and first == "KD" and rest.count("."):
        rule = _OF_HEADS.get(rest.partition(".")[2])
    return rule
