"""The table of config values: complete, not too strict, and no value ends in a traceback."""

from __future__ import annotations

import glob
import math
import random
import re
from pathlib import Path

import kd_models
import pytest
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage

from projects.kd import add_kd_config, load_config
from projects.kd.building import build_detector
from projects.kd.config import merge_overrides
from projects.kd.config.key_checks import check_each, check_values, flat
from projects.kd.config.key_table import rule_of
from projects.kd.engine.optim import build_optimizations
from projects.kd.errors import ConfigError, UserError
from projects.kd.files import zoo_config_folder

ROOT = Path(__file__).resolve().parents[2]
# Texts, and what is checked where it is used: files, data sets, and the keys of each head's node.
FREE = ("VERSION", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS", "GLOBAL.HACK")
FREE += ("INPUT.WHITE", "KD.DATASETS", "KD.SEM_SEG_DATASETS")


def defaults():
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def test_every_key_of_detectron2_has_a_rule_that_its_default_keeps():
    for key, value in flat(defaults()):
        rule = rule_of(key)
        if rule is not None:
            assert rule.test(value), key
        elif not key.startswith("KD.") and key not in FREE:
            assert isinstance(value, bool), f"{key} has no rule"


@pytest.mark.parametrize("folder", [str(ROOT / "configs"), zoo_config_folder()])
def test_all_shipped_configs_pass(folder):
    paths = [
        p
        for p in glob.glob(f"{folder}/**/*.yaml", recursive=True)
        if not re.search("suites|methods", p)
    ]
    assert len(paths) > 50
    for path in random.Random(0).sample(paths, 12):
        check_each(load_config(path), source=path)


def wrong(cfg, *words):
    merge_overrides(cfg, list(words))
    with pytest.raises(ConfigError) as error:
        check_values(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"), "did you mean WarmupCosineLR?"),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon"), "did you mean build_resnet_fpn_back"),
        (("INPUT.FORMAT", "GRAY"), "INPUT.FORMAT is 'GRAY', it must be one of 'BGR', 'RGB'"),
        (("INPUT.RANDOM_FLIP", "none2"), "INPUT.RANDOM_FLIP is 'none2'"),
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu': write cpu, cuda or cuda:<number>"),
        (("MODEL.DEVICE", "cuda:77"), "MODEL.DEVICE is 'cuda:77': "),
        (("MODEL.DEVICE", "meta"), "MODEL.DEVICE is 'meta'"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[64]]"), "SIZES has 2 lists, MODEL.RETINANET.IN"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[]]"), "MODEL.ANCHOR_GENERATOR.SIZES is"),
        (("MODEL.PIXEL_MEAN", "[1.0]", "MODEL.PIXEL_STD", "[1.0]"), "INPUT.FORMAT BGR takes three"),
        (("MODEL.PIXEL_STD", "[1.0]"), "MODEL.PIXEL_STD has 1 values, MODEL.PIXEL_MEAN 3"),
        (("MODEL.PIXEL_MEAN", "['a',1,2]"), "MODEL.PIXEL_MEAN is"),
        (("MODEL.RETINANET.IOU_THRESHOLDS", "[0.5]"), "MODEL.RETINANET.IOU_LABELS has 3 values"),
        (("SOLVER.BASE_LR", math.nan), "SOLVER.BASE_LR is nan"),
        (("SOLVER.STEPS", "(20, 10)"), "in rising order"),
        (("SOLVER.STEPS", "(1, 2)", "SOLVER.MAX_ITER", "2"), "SOLVER.STEPS has 2 steps, too many"),
        (("SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"), "SOLVER.NESTEROV needs"),
        (("INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[2.0,0.5]"), "parts of the image"),
        (("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"), "'range' needs two values"),
        (("MODEL.LOAD_PROPOSALS", "True"), "DATASETS.PROPOSAL_FILES_TRAIN has 0 files for 1 data"),
        (("DATASETS.TRAIN_REPEAT_FACTOR", "[['a', 0.0]]"), "DATASETS.TRAIN_REPEAT_FACTOR is"),
        (("KD.CWD.WEIGHT", "-2.0"), "KD.CWD.WEIGHT is -2.0, it must be a number from 0 on"),
        (("KD.FGFI.LEVELS", "('p3','p3')"), "none of them twice"),
        (("KD.FGFI.ANCHOR_SIZES", "[[]]"), "KD.FGFI.ANCHOR_SIZES is [[]]"),
        (("KD.ICD.OPTIMIZER.BASE_LR", "0.0"), "KD.ICD.OPTIMIZER.BASE_LR is 0.0"),
        (("TEST.EXPECTED_RESULTS", "[[1, 2]]"), "TEST.EXPECTED_RESULTS is"),
    ],
)
def test_wrong_values_name_their_key(words, message):
    assert message in wrong(kd_models.tiny_cfg(), *words)


def test_grey_images_take_one_mean_or_three():
    words = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[1.0]", "MODEL.PIXEL_STD", "[1.0]"]
    for count in (2, 6):
        cfg = kd_models.tiny_cfg()
        merge_overrides(cfg, words[:count] if count == 2 else words)
        check_values(cfg)


def test_evaluation_does_not_ask_for_what_only_training_reads():
    cfg = kd_models.tiny_cfg(SOLVER__BASE_LR=-1.0)
    check_values(cfg, training=False)
    cfg.TEST.DETECTIONS_PER_IMAGE = 0
    with pytest.raises(ConfigError, match=r"^TEST\.DETECTIONS_PER_IMAGE is 0"):
        check_values(cfg, training=False)


def test_a_warm_up_as_long_as_the_run_is_warned_of(caplog):
    cfg = kd_models.tiny_cfg(SOLVER__MAX_ITER=100, SOLVER__WARMUP_ITERS=99)
    check_values(cfg)
    assert not caplog.records
    cfg.SOLVER.WARMUP_ITERS = 100
    check_values(cfg)
    assert "SOLVER.WARMUP_ITERS 100 is not below SOLVER.MAX_ITER 100" in caplog.text


VALUES = [0, 1, 2, 3, -1, -7, 10**6, 0.0, 0.5, 1.0, 2.0, -0.5, 1e-9, math.inf, math.nan, True]
VALUES += [False, None, {"a": 1}, "", "foo", "p3", "BN", "smooth_l1", "cpu", [], [[]], [0], [0.5]]
VALUES += [[1, 2], [-1.0, 2.0], ["a"], ["p3", "p3"], [["p3", 2]], [[32], [64]], (1, 2, 3), [None]]


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_random_values_give_one_line_or_a_run(arch):
    """Merge, check, build, one step and one inference; the property of the whole table."""
    draw = random.Random(arch)
    usual = kd_models.tiny_cfg(arch)
    sections = ("MODEL.", "SOLVER.", "INPUT.", "TEST.", "DATALOADER.", "KD.")
    keys = [key for key, _ in flat(usual) if key.startswith(sections)]
    batch = kd_models.make_batch(((64, 64),))
    ran = refused = 0
    for _ in range(350):
        cfg = usual.clone()
        key, value = draw.choice(keys), draw.choice(VALUES)
        try:
            merge_overrides(cfg, [key, value])
            check_values(cfg)
            # of MODEL's keys; a width of a million is legal, and only takes memory
            if cfg.MODEL == usual.MODEL or value == 10**6:
                continue
            model = build_detector(cfg).train()
            build_optimizations(cfg, model)
            with EventStorage(0):
                assert model(batch)
                model.eval()(batch)
            ran += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (key, value)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{key} {value}: {type(error).__name__}: {error}") from error
    assert ran > 2 and refused > 90
