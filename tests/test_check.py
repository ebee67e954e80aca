"""Every config that cannot work is refused before anything is built, naming the key."""

import kd_models
import pytest
from detectron2.data import MetadataCatalog

from projects.kd import IMITATION_HEAD_REGISTRY, ConfigError, ImitationHead, check, check_config
from projects.kd.distiller import DistillMetaArch

SHAPES = "shapes_train"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return kd_models.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def cfg(files):
    classes = len(MetadataCatalog.get(SHAPES).thing_classes)
    return kd_models.distill_cfg(
        files, MODEL__RETINANET__NUM_CLASSES=classes, MODEL__ROI_HEADS__NUM_CLASSES=classes
    )


def refused(cfg, message, **kwargs):
    with pytest.raises(ConfigError, match=message) as error:
        check_config(cfg, **kwargs)
    assert "\n" not in str(error.value)


def test_a_good_config_passes(cfg):
    check_config(cfg)
    cfg.KD.HEADS = ("FGFI", "CWD", "PKD", "Mimic")
    check_config(cfg)
    cfg.KD.META_ARCHITECTURE = ""
    check_config(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNett", r"^MODEL\.META_ARCHITECTURE.*mean.*RetinaNet"),
        ("KD.META_ARCHITECTURE", "DistilMetaArch", r"^KD\.META_ARCHITECTURE.*DistillMetaArch"),
        ("DATASETS.TRAIN", (), r"^DATASETS\.TRAIN is empty"),
        ("DATASETS.TRAIN", ("shapes_trian",), r"^DATASETS\.TRAIN.*KD\.DATASETS.*shapes_train"),
        ("DATASETS.TEST", ("nowhere",), r"^DATASETS\.TEST.*'nowhere'"),
        ("MODEL.RETINANET.NUM_CLASSES", 80, r"^MODEL\.RETINANET\.NUM_CLASSES is 80.*shapes"),
        ("SOLVER.OPTIMIZER", "LAMB", r"^SOLVER\.OPTIMIZER.*AdamW"),
        (
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            "all",
            r"^SOLVER\.CLIP_GRADIENTS\.CLIP_TYPE.*full_model",
        ),
        ("SOLVER.AMP.DTYPE", "half", r"^SOLVER\.AMP\.DTYPE.*bfloat16"),
        ("KD.TEACHER.INPUT_SCALE", 0.0, r"^KD\.TEACHER\.INPUT_SCALE is 0\.0.*above 0"),
        ("KD.TEACHER.INPUT_SCALE", -2.0, r"^KD\.TEACHER\.INPUT_SCALE is -2\.0.*above 0"),
        ("SOLVER.ACCUM_STEPS", 0, r"^SOLVER\.ACCUM_STEPS is 0"),
        ("SOLVER.GATHER_METRIC_PERIOD", 0, r"^SOLVER\.GATHER_METRIC_PERIOD is 0"),
        ("SOLVER.MAX_ITER", 0, r"^SOLVER\.MAX_ITER is 0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, r"^SOLVER\.CHECKPOINT_PERIOD is 0"),
        ("SOLVER.CHECKPOINT_PERIOD", -1, r"^SOLVER\.CHECKPOINT_PERIOD is -1"),
        ("SOLVER.IMS_PER_BATCH", 0, r"^SOLVER\.IMS_PER_BATCH is 0"),
        ("SOLVER.EMA.DECAY", 1.0, r"^SOLVER\.EMA\.DECAY is 1\.0"),
        ("SOLVER.EMA.EVAL_ONLY", True, r"^SOLVER\.EMA\.EVAL_ONLY.*ENABLED"),
        ("KD.HEADS", (), r"^KD\.HEADS is empty"),
        ("KD.HEADS", ("CDW",), r"^KD\.HEADS.*'CDW'.*CWD.*FGFI.*Mimic.*PKD"),
        ("KD.HEADS", ("CWD", "CWD"), r"^KD\.HEADS names CWD twice"),
        ("KD.TEACHER.CONFIG_FILE", "", r"^KD\.TEACHER\.CONFIG_FILE is empty"),
        (
            "KD.TEACHER.CONFIG_FILE",
            "no.yaml",
            r"^KD\.TEACHER\.CONFIG_FILE: no such file 'no\.yaml'",
        ),
        ("KD.TEACHER.CONFIG_FILE", "model_zoo://no.yaml", r"^KD\.TEACHER\.CONFIG_FILE.*'no\.yaml'"),
        ("KD.TEACHER.WEIGHTS", "no.pth", r"^KD\.TEACHER\.WEIGHTS: no such file 'no\.pth'"),
        ("KD.TEACHER.DTYPE", "half", r"^KD\.TEACHER\.DTYPE is 'half'.*auto.*float16"),
        ("KD.ADAPTER.TYPE", "linear", r"^KD\.ADAPTER\.TYPE is 'linear'.*conv1x1"),
        ("KD.LOG_PERIOD", 0, r"^KD\.LOG_PERIOD is 0"),
        ("KD.LEVEL_MAP", ["p3", "p4"], r"^KD\.LEVEL_MAP"),
        ("KD.LEVEL_MAP", [["p3"]], r"^KD\.LEVEL_MAP"),
        ("KD.START_ITER", -1, r"^KD\.START_ITER is -1, it must be a whole number from 0 on"),
        ("KD.MIMIC.WARMUP_ITERS", -4, r"KD\.MIMIC.*WARMUP_ITERS"),
        ("KD.MIMIC.END_ITER", -5, r"^KD\.MIMIC\.END_ITER is -5"),
    ],
)
def test_refusals(cfg, key, value, message):
    node = cfg
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    assert last in node
    node[last] = value
    refused(cfg, message)


def test_two_kinds_of_crops_are_refused(cfg):
    cfg.INPUT.DETR_AUGMENTATION = True
    check_config(cfg)
    cfg.INPUT.CROP.ENABLED = cfg.INPUT.CROP.AFTER_RESIZE = True
    refused(cfg, r"^INPUT\.CROP\.AFTER_RESIZE: INPUT\.DETR_AUGMENTATION has its own crop")


def test_mask_formats(cfg):
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_config(cfg)
    cfg.INPUT.MASK_FORMAT = "rle"
    refused(cfg, r"^INPUT\.MASK_FORMAT is 'rle', it must be one of 'polygon', 'bitmask'")


def test_end_before_start(cfg):
    cfg.KD.START_ITER = 10
    cfg.KD.END_ITER = 5
    refused(cfg, r"KD\.MIMIC \(or KD\): END_ITER 5 lies before START_ITER 10")


def test_float16_needs_a_gpu(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    refused(cfg, r"^SOLVER\.AMP\.DTYPE: float16 needs a GPU")
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    check_config(cfg)


def test_evaluation_checks_only_what_it_uses(cfg):
    cfg.DATASETS.TRAIN = ("nowhere",)
    cfg.KD.HEADS = ("nothing",)
    cfg.KD.TEACHER.CONFIG_FILE = "nowhere"
    cfg.SOLVER.OPTIMIZER = "LAMB"
    check_config(cfg, training=False)
    cfg.DATASETS.TEST = ("nowhere",)
    refused(cfg, r"^DATASETS\.TEST", training=False)


def test_ordinary_training_needs_no_teacher(cfg):
    cfg.KD.META_ARCHITECTURE = ""
    cfg.KD.HEADS = ("nothing",)
    cfg.KD.TEACHER.CONFIG_FILE = "nowhere"
    check_config(cfg)


def test_a_head_without_a_config_node(cfg):
    @IMITATION_HEAD_REGISTRY.register()
    class Nodeless(ImitationHead):
        pass

    cfg.KD.HEADS = ("Nodeless",)
    refused(cfg, r"^KD\.NODELESS: head Nodeless registered no config node")


def test_weights_that_are_urls_are_not_looked_for(cfg):
    cfg.KD.TEACHER.WEIGHTS = "detectron2://some/where.pkl"
    check_config(cfg)


# What only the built detectors tell is refused while the wrapper is built.


def test_level_that_is_not_shared(cfg):
    cfg.KD.LEVELS = ("p3", "p9")
    with pytest.raises(ConfigError, match=r"^KD\.LEVELS: p9 .*p3.*p7"):
        DistillMetaArch.from_config(cfg)
    cfg.KD.LEVELS = ()
    cfg.KD.MIMIC.LEVELS = ("p2",)
    with pytest.raises(ConfigError, match=r"KD\.MIMIC\.LEVELS.*p2"):
        DistillMetaArch.from_config(cfg)


def test_level_map_with_unknown_levels(cfg):
    cfg.KD.LEVEL_MAP = [["p3", "p8"]]
    with pytest.raises(ConfigError, match=r"KD\.LEVEL_MAP: the teacher has no level p8"):
        DistillMetaArch.from_config(cfg)


def test_levels_are_chosen_finest_first_and_own_ones_win(cfg):
    cfg.KD.HEADS = ("Mimic", "PKD")
    cfg.KD.LEVELS = ("p5", "p3")
    cfg.KD.PKD.LEVELS = ("p4",)
    heads = DistillMetaArch.from_config(cfg)["heads"]
    assert heads["Mimic"].levels == ("p3", "p5") and heads["PKD"].levels == ("p4",)


def test_a_detector_that_cannot_feed_a_head(cfg, files):
    @IMITATION_HEAD_REGISTRY.register()
    class NeedsDense(ImitationHead):
        requires = frozenset({"features", "dense"})

    @IMITATION_HEAD_REGISTRY.register()
    class OnlyDense(ImitationHead):
        supports = ("DenseDetector",)

    rcnn = kd_models.distill_cfg(files, "GeneralizedRCNN", heads=("NeedsDense",))
    with pytest.raises(ConfigError) as error:
        DistillMetaArch.from_config(rcnn)
    for part in ("KD.HEADS", "NeedsDense", "dense", "student GeneralizedRCNN", "DenseDetector"):
        assert part in str(error.value)
    rcnn.KD.HEADS = ("OnlyDense",)
    with pytest.raises(ConfigError, match=r"KD\.HEADS: OnlyDense.*GeneralizedRCNN.*DenseDetector"):
        DistillMetaArch.from_config(rcnn)


def test_different_channels_without_an_adapter(cfg):
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.KD.ADAPTER.TYPE = "none"
    with pytest.raises(ConfigError, match=r"KD\.ADAPTER\.TYPE: 'none' needs equal channels.*8.*16"):
        DistillMetaArch.from_config(cfg)


def test_data_set_whose_file_is_not_there(cfg):
    cfg.DATASETS.TRAIN = ("lvis_v1_train",)
    refused(cfg, "DATASETS.TRAIN: data set 'lvis_v1_train' needs the file .*DETECTRON2_DATASETS")


@pytest.mark.parametrize("able", [True, False])
def test_slow_bfloat16_is_said(cfg, monkeypatch, caplog, able):
    monkeypatch.setattr(check, "cpu_computes_bfloat16", lambda: able)
    cfg.MODEL.DEVICE = "cpu"
    cfg.KD.TEACHER.DTYPE = "bfloat16"
    with caplog.at_level("WARNING", logger=check.__name__):
        check_config(cfg)
        assert len(caplog.records) == (not able)
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
        caplog.clear()
        check_config(cfg)
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ([] if able else ["SOLVER.AMP.DTYPE", "KD.TEACHER.DTYPE"])
