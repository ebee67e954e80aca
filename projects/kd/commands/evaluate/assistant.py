"""Evaluate the assistant of a run with CSA, and the student of the same training checkpoint.

    kd-evaluate assistant --config-file CONFIG MODEL.WEIGHTS CHECKPOINT

Both are evaluated on the student's input. A warning is printed if the assistant is the worse of the
two: then distilling from it is pointless. Results are written to OUTPUT_DIR/assistant_evaluation.
"""

from __future__ import annotations

import argparse
import os

import torch

from ...analysis.assistant import build_assistant, judge
from ...arguments import Parser
from ...evaluation import evaluate
from .teacher import read_config, write


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> dict:
    cfg = read_config(args)
    assistant, mapper = build_assistant(cfg)
    folder = os.path.join(cfg.OUTPUT_DIR, "assistant_evaluation")
    results = {}
    with torch.no_grad():
        for name, model in (("assistant", assistant), ("student", assistant.student)):
            own_folder = os.path.join(folder, name)
            results[name] = evaluate(cfg, model, output_dir=own_folder, mapper=mapper)
    report = {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "data": list(cfg.DATASETS.TEST),
        "verdict": judge(results["assistant"], results["student"]),
        "results": results,
    }
    write(report, folder)
    return report
