"""Let a teacher label images: a COCO json with scores, to train on.

    kd-pseudo-label --config-file CONFIG --images FOLDER --output labels.json --threshold 0.6
    kd-pseudo-label --config-file CONFIG --dataset "cars_train[150:]" --output labels.json \\
        --classes-of mine/train.json --class-map automobile=car --class-threshold car=0.4

The detector is the teacher of KD.TEACHER, or the model of the config itself with MODEL.WEIGHTS.
Images are those of a folder (and below), or of a registered data set, whose annotations are not
read. Boxes, masks (as run lengths) and keypoints are written, as far as the detector finds them.

A run that ended goes on when it is called again; what is done lies in <output>.unfinished. The json
itself appears at the end. A file that is there is never overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils.logger import setup_logger

from ..arguments import Parser, number, output_file
from ..check import check_config
from ..config import load_config
from ..data.image_check import ImageFile, find_problem, look_at
from ..data.mapper import ImageMapper, NamedErrors
from ..data.register import register_configured
from ..data.slices import register_slice
from ..data.unlabelled import paths_below
from ..errors import ConfigError, DataError, did_you_mean, exit_on_user_error
from ..evaluation.label_classes import label_rules
from ..evaluation.pseudo_labels import LabelRules, Progress, counted, tables, write_tables
from ..evaluation.tiles import TiledDetector
from ..evaluation.tta import tta_class
from .evaluate.teacher import Detector, build

logger = logging.getLogger("projects.kd.commands.pseudo_label")
_LOG_SECONDS = 10.0


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--images", default="", metavar="FOLDER", help="all images in and below it")
    parser.add_argument("--dataset", default="", metavar="NAME", help="a data set, or NAME[a:b]")
    parser.add_argument("--output", type=output_file, required=True, help="COCO json to write")
    parser.add_argument("--threshold", type=number(0, 1), default=0.5, help="least score")
    parser.add_argument(
        "--class-threshold", action="append", default=[], metavar="CLASS=SCORE", help="of one class"
    )
    parser.add_argument(
        "--classes-of", default="", help="COCO json or data set whose classes the file gets"
    )
    parser.add_argument(
        "--class-map",
        action="append",
        default=[],
        metavar="DETECTOR=FILE",
        help="names that differ",
    )
    parser.add_argument(
        "--keypoint-threshold", type=number(0), default=0.05, help="keypoints below get flag 0"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation of TEST.AUG")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def read_config(args):
    """The config, checked as far as labelling needs it."""
    if bool(args.images) == bool(args.dataset):
        raise ConfigError("--images or --dataset: name what to label by one of them")
    if args.output and os.path.exists(args.output):
        raise ConfigError(f"--output: {args.output} is there already: remove it, or choose another")
    setup_logger()
    setup_logger(name="projects")
    cfg = load_config(args.config_file, args.opts)
    cfg.DATASETS.TEST = ()
    register_configured(cfg)
    check_config(cfg, training=False)
    return cfg


def find_images(args) -> tuple[list[dict], str]:
    """Data set dicts without annotations, and the folder that their names are relative to."""
    if args.images:
        if not os.path.isdir(args.images):
            raise ConfigError(f"--images: no such folder '{args.images}'")
        folder = os.path.abspath(args.images)
        return [{"file_name": path} for path in paths_below(folder)], folder
    register_slice(args.dataset)
    if args.dataset not in DatasetCatalog:
        raise ConfigError(
            f"--dataset: no data set '{args.dataset}' is registered (KD.DATASETS)"
            f"{did_you_mean(args.dataset, list(DatasetCatalog))}"
        )
    kept = ("file_name", "height", "width")
    rows = [{k: x[k] for k in kept if k in x} for x in DatasetCatalog.get(args.dataset)]
    if not rows:
        raise DataError(f"--dataset: '{args.dataset}' has no image")
    folder = MetadataCatalog.get(args.dataset).get("image_root")
    names = [os.path.abspath(row["file_name"]) for row in rows]
    return rows, os.path.abspath(folder) if folder else os.path.dirname(os.path.commonprefix(names))


def readable(args, cfg, images: list[dict]) -> list[dict]:
    """The images whose headers can be read; DataError for the others, unless they are skipped."""
    files = [ImageFile(x["file_name"], None, "", ()) for x in images]
    found = look_at(files, lambda file: find_problem(file, cfg.INPUT.WHITE), math.inf)
    bad = [finding.problem for finding in found if finding.problem]
    if bad and not args.skip_unreadable:
        more = f"; and {len(bad) - 1} more of {len(images)} images cannot be read" * (len(bad) > 1)
        raise DataError(f"{bad[0]}{more}; --skip-unreadable leaves them out")
    for problem in bad:
        logger.warning(f"left out: {problem}")
    kept = [x for x, finding in zip(images, found, strict=True) if not finding.problem]
    if not kept:
        raise DataError(f"{args.images or args.dataset}: no image is left")
    return kept


def prepared(args, detector: Detector):
    """What is called with an example, and the config whose INPUT it is made by."""
    cfg = detector.cfg.clone()
    cfg.defrost()
    if not args.tta:
        if cfg.TEST.TILES.ENABLED:
            return TiledDetector.from_config(cfg, detector.model), cfg
        return detector.model, cfg
    if detector.own is None or cfg.TEST.TILES.ENABLED:
        raise ConfigError("--tta needs a detector of a .yaml config, and TEST.TILES.ENABLED False")
    if detector.own.MODEL.KEYPOINT_ON:
        raise ConfigError("--tta: detectron2 has no test-time augmentation of keypoints")
    cfg.INPUT.MIN_SIZE_TEST = 0  # the whole image: the augmentation resizes it
    return tta_class(detector.own)(detector.own, detector.model), cfg


class Tried:
    """A mapper whose errors are its result: raised in a worker they would end the loader."""

    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, image: dict):
        """File name, and the example or what is wrong with the image."""
        try:
            return image["file_name"], self.mapper(image)
        except DataError as error:
            return image["file_name"], error


def label(args, images, folder: str, model, cfg, rules: LabelRules, progress: Progress) -> None:
    """Run the detector on all images that are not done."""
    todo = [x for x in images if os.path.relpath(x["file_name"], folder) not in progress.done]
    if len(todo) < len(images):
        logger.info(f"{len(images) - len(todo)} of {len(images)} images were done before")
    if not todo:
        return
    loader = build_detection_test_loader(
        todo,
        mapper=Tried(NamedErrors(ImageMapper(cfg, is_train=False))),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    start = told = time.monotonic()
    objects = 0
    for count, ((path, example),) in enumerate(loader, start=1):
        name = os.path.relpath(path, folder)
        if isinstance(example, DataError):
            if not args.skip_unreadable:
                raise DataError(f"{example}; --skip-unreadable leaves such images out")
            logger.warning(f"left out: {example}")
            progress.add(name, skipped=True)
            continue
        rows = rules.rows(model([example])[0]["instances"])
        progress.add(name, width=example["width"], height=example["height"], rows=rows)
        objects += len(rows)
        now = time.monotonic()
        if now - told >= _LOG_SECONDS or count == len(todo):
            told, left = now, (now - start) / count * (len(todo) - count)
            logger.info(
                f"{count} of {len(todo)} images, {objects / count:.1f} objects an image, "
                f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
            )


def settings_of(args, detector: Detector, images, folder: str, rules: LabelRules) -> dict:
    """What a result depends on."""
    configs = [detector.cfg.dump(), detector.own.dump() if detector.own is not None else ""]
    weights = sum(float(x.double().abs().sum()) for x in detector.model.state_dict().values())
    return {
        "config": _digest(configs),
        "weights": weights.hex(),
        "images": _digest([folder, *(x["file_name"] for x in images)]),
        "classes": _digest([str(rules.categories), str(dict(rules.ids))]),
        "threshold": [sorted(rules.thresholds.items(), key=str), rules.keypoint_score],
        "tta": args.tta,
    }


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def main(args) -> dict:
    cfg = read_config(args)
    images, folder = find_images(args)
    images = readable(args, cfg, images)
    detector = build(cfg, student_input=False)
    rules = label_rules(
        detector.model,
        detector.names,
        detector.cfg.MODEL.KEYPOINT_ON,
        threshold=args.threshold,
        class_threshold=args.class_threshold,
        classes_of=args.classes_of,
        class_map=args.class_map,
        keypoint_threshold=args.keypoint_threshold,
    )
    model, cfg = prepared(args, detector)
    settings = settings_of(args, detector, images, folder, rules)
    progress = Progress(f"{args.output}.unfinished", settings)
    with torch.no_grad():
        label(args, images, folder, model, cfg, rules, progress)
    names = (os.path.relpath(x["file_name"], folder) for x in images)
    done = ({"file_name": name, **progress.done[name]} for name in names)
    info = {"description": f"pseudo-labels by {args.config_file}", "threshold": args.threshold}
    content = tables((x for x in done if "rows" in x), rules.categories, info)
    write_tables(args.output, content)
    progress.remove()
    report(args.output, folder, content)
    return content


def report(path: str, folder: str, content: dict) -> None:
    """What was written, and how to train on it."""
    print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} objects")
    for name, count in counted(content).items():
        print(f"  {count:>8} {name}")
    print(f'KD.DATASETS: ["pseudo", "{path}", "{folder}"]')
    if any("segmentation" in row for row in content["annotations"]):
        print("MODEL.MASK_ON needs INPUT.MASK_FORMAT bitmask for it")


def run() -> None:
    """The command."""
    with exit_on_user_error():
        main(parse_arguments())


if __name__ == "__main__":
    run()
