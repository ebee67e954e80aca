"""Pictures by object size: a histogram of a data set, and detections in COCO's size bands.

    kd-visualize sizes --dataset visdrone_train --output sizes.png
    kd-visualize sizes --dataset visdrone_val --output found.png [--num 3] [--threshold 0.3] \\
        --results RUN/inference/coco_instances_results.json

With --config-file, the data sets of its KD.DATASETS and KD.IMPORTS can be shown as well, and the
sizes at its training size are printed, with anchors that fit them.
"""

from __future__ import annotations

import argparse

from detectron2.data import DatasetCatalog

from ...analysis.size_advice import size_advice
from ...analysis.size_pictures import detections_by_size, size_histogram
from ...arguments import Parser, number, output_file, whole
from ...config import LazyNode, load_config
from ...data.register import register_configured
from ...errors import ConfigError


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", required=True, help="a registered data set with boxes")
    parser.add_argument("--output", type=output_file, required=True, help="the picture to write")
    parser.add_argument("--results", default="", help="COCO results file: draw its detections")
    parser.add_argument(
        "--num", type=whole(1), default=3, help="images, those with the most objects"
    )
    parser.add_argument(
        "--threshold", type=number(0, 1), default=0.3, help="least score that counts"
    )
    parser.add_argument("--config-file", default="", help="config with KD.DATASETS or KD.IMPORTS")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args):
    if args.opts and not args.config_file:
        raise ConfigError(f"{args.opts[0]}: overrides need --config-file")
    cfg = load_config(args.config_file, args.opts) if args.config_file else None
    if cfg is not None:
        register_configured(cfg)
    if args.dataset not in DatasetCatalog.list():
        raise ConfigError(f"--dataset: '{args.dataset}' is not registered")
    if not args.results:
        shares = size_histogram(args.dataset, args.output)
        print(", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
        if isinstance(cfg, LazyNode):
            print("no advice on sizes and anchors: it is for the keys of a YAML config")
        elif cfg is not None:
            print(size_advice(args.dataset, cfg).text())
        return shares
    counts = detections_by_size(args.dataset, args.results, args.output, args.num, args.threshold)
    for name, (found, missed, false) in counts.items():
        print(f"{name:8} {found:5} found {missed:5} missed {false:5} false")
    return counts
