"""Evaluate the teacher of a distillation config: the first thing to run.

    kd-evaluate teacher --config-file CONFIG [--name NAME] [KEY VALUE ...]

Builds the teacher of KD.TEACHER, or, when the config names none, the model of the config itself
with MODEL.WEIGHTS, and evaluates it on DATASETS.TEST. Images are resized and ordered as the
teacher's own config says (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST, FORMAT); with --student-input as the
student's config says, times KD.TEACHER.INPUT_SCALE: what it sees in training. Channel order always
follows the teacher. A torchvision detector gets images as they are and resizes by itself, unless
--student-input is given. Predictions and metrics.json are written to OUTPUT_DIR/teacher_evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from ... import ConfigError, build_teacher, check_config, load_config
from ...arguments import Parser
from ...building import build_detector
from ...config.teachers import config_of
from ...data.classes import check_taught_names
from ...data.image_check import check_images
from ...data.register import names_by_kind, register_configured
from ...errors import require_one_of
from ...evaluation import check_evaluation, evaluate
from ...foreign import ForeignDetector
from ...weights.loading import load_detector

INPUT_KEYS = ("MIN_SIZE_TEST", "MAX_SIZE_TEST")


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--name", metavar="NAME", help="which one of KD.TEACHERS")
    parser.add_argument("--student-input", action="store_true", help="resize as for the student")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


class Detector(NamedTuple):
    """A detector in eval mode.

    Attributes:
        model: the detector.
        cfg: whose INPUT, TEST, MODEL.MASK_ON and KEYPOINT_ON describe it.
        own: the config that it was built from, None for a LazyConfig.
        names: what it learnt to find, see :func:`~projects.kd.data.register.names_by_kind`.
    """

    model: torch.nn.Module
    cfg: CfgNode
    own: CfgNode | None
    names: Mapping[str, Sequence[str]]


def build(cfg, student_input: bool) -> Detector:
    """The teacher of KD.TEACHER, or the model of the config itself."""
    cfg = cfg.clone()
    if cfg.KD.TEACHERS:
        raise ConfigError("KD.TEACHERS: one of them is needed here, write it into KD.TEACHER")
    if not cfg.KD.TEACHER.CONFIG_FILE:
        if not cfg.MODEL.WEIGHTS:
            raise ConfigError("MODEL.WEIGHTS is empty: name the weights to evaluate")
        model = build_detector(cfg)
        missing = load_detector(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
        if missing:
            raise ConfigError(
                f"MODEL.WEIGHTS: '{cfg.MODEL.WEIGHTS}' lacks {len(missing)} of the model's "
                f"parameters: {', '.join(missing)}"
            )
        names = names_by_kind([cfg], cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else {}
        return Detector(model.eval(), cfg, cfg, names)
    teacher = build_teacher(cfg)
    # evaluation data in the order of its classes, where they are the same
    register_configured(cfg, teacher.names.get("thing_classes"))
    check_taught_names(cfg, teacher.names)
    in_students_numbers(teacher)
    cfg.INPUT.FORMAT = teacher.input_format
    if isinstance(teacher.model, ForeignDetector):
        _as_its_library(cfg, teacher.model, student_input)
    if teacher.cfg is not None:
        # what this model predicts, and how many of it
        cfg.MODEL.MASK_ON = teacher.cfg.MODEL.MASK_ON
        cfg.MODEL.KEYPOINT_ON = teacher.cfg.MODEL.KEYPOINT_ON
        cfg.TEST.DETECTIONS_PER_IMAGE = teacher.cfg.TEST.DETECTIONS_PER_IMAGE
        says = getattr(teacher.cfg, "holds", lambda key: True)  # a LazyConfig may say no size
        for key in () if student_input else INPUT_KEYS:
            if says(f"INPUT.{key}"):
                cfg.INPUT[key] = teacher.cfg.INPUT[key]
    for key in INPUT_KEYS if student_input else ():
        cfg.INPUT[key] = round(cfg.INPUT[key] * cfg.KD.TEACHER.INPUT_SCALE)
    names = dict(teacher.names)
    if cfg.DATASETS.TRAIN and any(x.known is not None for x in teacher.shared.values()):
        names |= names_by_kind([cfg], cfg.DATASETS.TRAIN[0])  # its detections have these numbers
    return Detector(teacher.model, cfg, teacher.cfg, names)


def in_students_numbers(teacher) -> None:
    """Detections get the student's numbers of classes where the teacher knows some of them alone.

    Raises:
        ConfigError: label maps of some of the student's classes, which have no numbers of their own
            for the rest.
    """
    lacking = {kind: own for kind, own in teacher.shared.items() if own.known is not None}
    if "stuff_classes" in lacking:
        raise ConfigError(
            "KD.TEACHER.CLASS_MAP: the teacher lacks classes of pixels that the data have, so its "
            "label maps cannot be evaluated there; evaluate it without, on data of its own"
        )
    if not lacking:
        return

    def renumber(module, inputs, outputs):
        for output in outputs if isinstance(outputs, list) else ():
            if "instances" in output:
                found = output["instances"]
                found.pred_classes = lacking["thing_classes"].own(found.pred_classes)

    teacher.model.register_forward_hook(renumber)


def _as_its_library(cfg, model: ForeignDetector, student_input: bool) -> None:
    """A model of another library is evaluated with what it says of itself."""
    if not model.predicts:
        model([])  # says so
    model.resizes = model.resizes and not student_input
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    points = all(MetadataCatalog.get(name).get("keypoint_names") for name in names)
    for key, value in model.evaluated_with.items():
        if key == "MODEL.KEYPOINT_ON":  # the data may have none
            value = value and points
        if not (student_input and key.startswith("INPUT.")):
            cfg.merge_from_list([key, value])


def read_config(args):
    """The config to evaluate with, checked before any model is built."""
    setup_logger()
    setup_logger(name="projects")
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg, training=False)
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    check_evaluation(cfg)
    check_images(cfg, training=False)
    return cfg


def main(args):
    cfg = read_config(args)
    if cfg.KD.TEACHERS or args.name:
        require_one_of("--name", args.name, sorted(cfg.KD.TEACHERS))
        cfg = config_of(cfg, args.name)
    model, cfg, *_ = build(cfg, args.student_input)
    folder = os.path.join(cfg.OUTPUT_DIR, "teacher_evaluation")
    with torch.no_grad():
        # a student's LazyConfig has a loader for the student
        names = cfg.DATASETS.TEST if cfg.KD.TEACHER.CONFIG_FILE else None
        results = evaluate(cfg, model, names, output_dir=folder)
    report = {
        "config": args.config_file,
        "teacher": cfg.KD.TEACHER.CONFIG_FILE or args.config_file,
        "weights": cfg.KD.TEACHER.WEIGHTS if cfg.KD.TEACHER.CONFIG_FILE else cfg.MODEL.WEIGHTS,
        "data": list(cfg.DATASETS.TEST),
        "input": {key: cfg.INPUT[key] for key in (*INPUT_KEYS, "FORMAT")},
        "results": results,
    }
    write(report, folder)
    return report


def write(report: dict, folder: str) -> None:
    """Write metrics.json, and say where."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "metrics.json")
    with open(path, "w") as file:
        json.dump(report, file, indent=1)
    print(f"written to {path}")
