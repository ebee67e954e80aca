"""Write published weights of Conditional DETR under the names of this project.

    kd-convert conditional_detr --config-file configs/COCO-DETR/... --input IN --output OUT

IN is a .pth of the authors' repository or of detrex, or a .pth or .safetensors of Hugging Face
transformers; which one is found from its keys. The 91 class rows of the first and the last become
80 for a config with 80 classes. Everything that does not fit the config's model is listed, and
refused, except for a classifier with another number of classes, which is initialised again.

The weights expect RGB images with ImageNet's statistics (MODEL.PIXEL_MEAN, PIXEL_STD,
INPUT.FORMAT), as the configs of configs/COCO-DETR have them.
"""

from __future__ import annotations

import argparse

import torch
from detectron2.modeling import build_model

from ... import ConfigError, load_config
from ...arguments import Parser, output_file
from ...modeling.conditional_detr_weights import (
    compare,
    convert,
    read_weights,
)


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, help="of a ConditionalDETR")
    parser.add_argument("--input", required=True, help="file to read (.pth or .safetensors)")
    parser.add_argument("--output", type=output_file, required=True, help="file to write (.pth)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> None:
    if not args.output.endswith(".pth"):
        raise ConfigError(f"--output: '{args.output}' must end in .pth")
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "ConditionalDETR":
        raise ConfigError(
            f"--config-file: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, it must be "
            "ConditionalDETR"
        )
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    converted = convert(read_weights(args.input, "--input"), model.num_classes)
    mismatch = compare(converted.state, model)
    left_out = [note.split(":")[0] for note in converted.notes if "left out" in note]
    mismatch.missing = [name for name in mismatch.missing if name not in left_out]
    if mismatch:
        raise ConfigError(
            f"--input: '{args.input}' ({converted.layout} layout) does not fit --config-file: "
            f"{mismatch}"
        )
    state = {name: value.contiguous() for name, value in converted.state.items()}
    torch.save({"model": state, "__author__": converted.layout}, args.output)
    for note in converted.notes:
        print(note)
    print(f"{args.output}: {len(state)} tensors, from the {converted.layout} layout")
