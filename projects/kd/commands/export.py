"""Export a trained student: ONNX, TorchScript or torch.export, checked and timed.

    kd-export --config-file CONFIG --output student.onnx MODEL.WEIGHTS output/model_final.pth
    kd-export ... --precision int8 --check 20 --ap
    kd-export ... --benchmark teacher=output/teacher plain=output/plain --plot latency.png ...

The suffix of --output decides: .onnx, .ts (TorchScript, traced) or .pt2 (torch.export). CONFIG may
be the config of a distillation. The image goes in as (1, 3, height, width), any size (.pt2: one
--size), 0 to 255, in the order of INPUT.FORMAT; normalisation and padding are in the graph. What is
left to the user, resizing before and scaling after, stands in FILE.json beside the file and in the
file's own metadata, with the class names. Batch norms become part of the convolutions.

--check compares with the detector itself on images of DATASETS.TEST (or --images), --ap evaluates
both on all of DATASETS.TEST. --benchmark times the detector, the file, and runs named NAME=FOLDER
in turns; a flag follows before KEY VALUE. An exported file can be evaluated and shown like weights:
MODEL.WEIGHTS student.onnx.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import tempfile

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from .. import ConfigError, check_config, load_config
from ..analysis import latency
from ..analysis.pictures import ap_against_latency
from ..arguments import Parser, image_size, output_file, whole
from ..check import check_data_set
from ..data.mapper import ImageMapper
from ..data.register import register_configured
from ..deploy.facts import facts_of
from ..deploy.formats import OPSET, check_opset, check_size, format_of, require_onnx, write
from ..deploy.graphs import graph_of
from ..deploy.lower import PRECISIONS, lower
from ..deploy.parity import Differences, differences
from ..deploy.runtime import ExportedDetector
from ..deploy.use import trained_detector
from ..errors import exit_on_user_error
from ..evaluation import evaluate
from ..files import write_atomically
from ..fusing import fuse_batch_norms
from .demo import image_files


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, type=output_file, help=".onnx, .ts or .pt2")
    parser.add_argument("--opset", type=int, default=OPSET, help=f"of ONNX, default {OPSET}")
    parser.add_argument(
        "--size", type=image_size(), metavar="HxW", help="of all images, for .pt2 alone"
    )
    parser.add_argument(
        "--no-nms",
        action="store_true",
        help="leave a one-stage detector's suppression outside; its graph takes batches then",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of ONNX's networks"
    )
    parser.add_argument(
        "--calibration-images",
        type=whole(1),
        default=32,
        metavar="N",
        help="for int8, of DATASETS.TRAIN or --images",
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help="images or folders of images")
    parser.add_argument("--check", type=whole(), default=0, metavar="N", help="images")
    parser.add_argument("--ap", action="store_true", help="AP of file and detector")
    parser.add_argument("--benchmark", nargs="*", metavar="NAME=FOLDER", help="times, see above")
    parser.add_argument("--rounds", type=whole(1), default=11, help="of --benchmark")
    parser.add_argument("--threads", type=whole(1), default=1, help="of --benchmark")
    parser.add_argument("--plot", type=output_file, default="", help="AP against latency, a .png")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def check_arguments(args, cfg) -> None:
    """Refuse what would fail after the work, or do nothing."""
    onnx = format_of(args.output) == "ONNX"
    if onnx:
        require_onnx("--output")
        check_opset(args.opset)
    elif args.precision != PRECISIONS[0] or args.opset != OPSET:
        raise ConfigError("--precision and --opset are of ONNX: give --output a name with .onnx")
    if format_of(args.output) == "torch.export":
        check_size(args.size)
    elif args.size:
        raise ConfigError("--size is for .pt2, the other formats take images of any size")
    if args.plot and args.benchmark is None:
        raise ConfigError("--plot needs --benchmark")
    if args.ap and not cfg.DATASETS.TEST:
        raise ConfigError("--ap: DATASETS.TEST is empty")
    for words in args.benchmark or ():
        latency.named_run(words)


def records_of(args, names, number: int, key: str) -> list[dict]:
    """Data set dicts of ``number`` images, evenly spread, of --images or the first of ``names``.

    Raises:
        ConfigError: there is none, or no such data set.
    """
    if args.images:
        found = [{"file_name": path} for path in image_files(args.images, "--images")]
    else:
        if not names:
            raise ConfigError(f"{key} is empty: name a data set, or give --images")
        check_data_set(key, names[0])
        found = DatasetCatalog.get(names[0])
    if not found:
        raise ConfigError(f"{key}: '{names[0]}' has no images: name another, or give --images")
    places = np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int)
    return [found[i] for i in places]


def export(args, cfg, model) -> dict:
    """Write the file; returns its facts."""
    used = copy.deepcopy(model)
    fuse_batch_norms(used)
    graph = graph_of(used, suppress=not args.no_nms)
    images = []
    if args.precision == "int8":
        records = records_of(args, cfg.DATASETS.TRAIN, args.calibration_images, "DATASETS.TRAIN")
        mapper = ImageMapper(cfg, is_train=False)
        images = [mapper(record)["image"][None] for record in records]
    facts = {**facts_of(cfg, graph), "precision": args.precision}
    facts["source"] = {"config": args.config_file, "weights": cfg.MODEL.WEIGHTS}
    if args.precision == "float32":
        facts = write(args.output, graph, facts, args.opset, args.size)
    else:  # an old file stays until the last step is done
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, os.path.basename(args.output))
            facts = write(path, graph, facts, args.opset)
            lower(path, args.output, args.precision, images)
    size = os.path.getsize(args.output) / 1e6
    print(f"{args.output}: {facts['detector']}, {', '.join(facts['outputs'])}, {size:.1f} MB")
    return facts


def show(found: Differences) -> str:
    names = {"boxes": "boxes, pixels", "keypoints": "keypoints, pixels", "best_alone": "best alone"}
    rows = [(names.get(k, k), f"{v:.3g}") for k, v in dataclasses.asdict(found).items()]
    return tabulate(rows, ["largest difference", ""], disable_numparse=True)


def evaluated(cfg, models: dict) -> dict:
    """The main metric of each model on DATASETS.TEST by task; predictions are not kept."""
    results = {}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate(cfg, model, output_dir=folder)
        results[name] = {
            f"{task}/{metric}": value
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if metric in ("AP", "mIoU", "PQ")
        }
    return results


def show_ap(results: dict) -> str:
    names = next(iter(results.values()))
    rows = [[name, *(f"{x[key]:.3f}" for key in names)] for name, x in results.items()]
    return tabulate(rows, ["", *names], disable_numparse=True)


def benchmark(args, cfg, model, exported) -> list[dict]:
    """Time everything that is named."""
    records = records_of(args, cfg.DATASETS.TEST, 4, "DATASETS.TEST")
    own = latency.candidate_of(cfg, records, model)
    candidates = {
        "student": own,
        os.path.basename(args.output): dataclasses.replace(
            own, model=exported, bytes=os.path.getsize(args.output)
        ),
    }
    candidates |= dict(latency.candidate_of_run(words, records) for words in args.benchmark)
    seconds = latency.latencies(candidates, threads=args.threads, rounds=args.rounds)
    return latency.report(candidates, seconds)


def main(args) -> dict:
    setup_logger(name="projects")
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    tested = cfg.DATASETS.TEST
    if not (args.ap or args.benchmark is not None or (args.check and not args.images)):
        cfg.DATASETS.TEST = ()  # a student can be exported where its data are not
    check_config(cfg, training=False)
    cfg.DATASETS.TEST, cfg.MODEL.DEVICE = tested, "cpu"
    check_arguments(args, cfg)
    model = trained_detector(cfg)
    facts = export(args, cfg, model)
    exported = ExportedDetector.load(args.output, "--output", args.threads)
    if args.check:
        mapper = ImageMapper(cfg, is_train=False)
        records = records_of(args, cfg.DATASETS.TEST, args.check, "DATASETS.TEST")
        found = differences(model, exported, map(mapper, records))
        print(show(found))
        facts["check"] = dataclasses.asdict(found)
    if args.ap:
        facts["evaluation"] = evaluated(cfg, {"detector": model, "exported": exported})
        print(show_ap(facts["evaluation"]))
    if args.benchmark is not None:
        rows = facts["benchmark"] = benchmark(args, cfg, model, exported)
        print(f"{latency.table(rows)}\n{args.threads} CPU threads, {args.rounds} rounds")
        if args.plot:
            ap_against_latency(rows, args.plot)
    write_atomically(args.output + ".json", json.dumps(facts, indent=1))
    return facts


def run() -> None:
    """The command."""
    with exit_on_user_error():
        main(parse_arguments())
