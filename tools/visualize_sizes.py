#!/usr/bin/env python
"""Pictures by object size: a histogram of a data set, and detections in COCO's size bands.

    python tools/visualize_sizes.py --dataset visdrone_train --output sizes.png
    python tools/visualize_sizes.py --dataset visdrone_val --results RUN/inference/\
coco_instances_results.json --output found.png [--num 3] [--threshold 0.3]

With --config-file, the data sets of its KD.DATASETS and KD.IMPORTS can be shown as well, and the
sizes at its training size are printed, with anchors that fit them.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from detectron2.data import DatasetCatalog  # noqa: E402

from projects.kd.analysis.size_advice import size_advice  # noqa: E402
from projects.kd.analysis.size_pictures import detections_by_size, size_histogram  # noqa: E402
from projects.kd.arguments import Parser, number, output_file, whole  # noqa: E402
from projects.kd.config import load_config  # noqa: E402
from projects.kd.data.register import register_configured  # noqa: E402
from projects.kd.errors import ConfigError, exit_on_user_error  # noqa: E402


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
    return parser.parse_args(argv)


def main(args):
    cfg = load_config(args.config_file) if args.config_file else None
    if cfg is not None:
        register_configured(cfg)
    if args.dataset not in DatasetCatalog.list():
        raise ConfigError(f"--dataset: '{args.dataset}' is not registered")
    if not args.results:
        shares = size_histogram(args.dataset, args.output)
        print(", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
        if cfg is not None:
            print(size_advice(args.dataset, cfg).text())
        return shares
    counts = detections_by_size(args.dataset, args.results, args.output, args.num, args.threshold)
    for name, (found, missed, false) in counts.items():
        print(f"{name:8} {found:5} found {missed:5} missed {false:5} false")
    return counts


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments())
