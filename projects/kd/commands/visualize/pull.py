"""Draw where imitation heads pull the student in one image: the gradient of their losses.

    kd-visualize pull --config-file CONFIG --output pull.png KD.HEADS "('CWD', 'PKD')"

A row for each head of KD.HEADS, a column for each map that it acts on, fine to coarse: the norm
over channels of the gradient of the head's loss_kd_* in every cell, in parts of the head's largest.
The percentage is the map's part of the squared norm. The first column shows the objects.

Heads with modules of their own (ICD, CSA, ...) point somewhere sensible once these are trained:
--checkpoint takes one that training wrote, with the heads' state. Without it the student is the
one of MODEL.WEIGHTS. Batch norms work by their running statistics, and no schedule is applied.
"""

from __future__ import annotations

import argparse

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from detectron2.utils.env import seed_all_rng
from matplotlib.patches import Rectangle

from ... import build_training_model, check_config, load_config
from ...analysis.pictures import write_picture
from ...arguments import Parser, output_file, whole
from ...data.register import register_configured
from ...engine.pulls import pulls, undisturbed
from ...errors import ConfigError
from ...weights.loading import load_detector, load_run
from .distill import load_example


def draw(path: str, image: torch.Tensor, boxes: torch.Tensor, found: dict) -> None:
    """Write the picture.

    Args:
        path: of the file.
        image: (H, W, 3) RGB, 0..255.
        boxes: (M, 4) XYXY in its pixels.
        found: of :func:`pulls`.
    """
    height, width = image.shape[:2]
    columns = 1 + max(map(len, found.values()))
    figure, grid = plt.subplots(
        len(found),
        columns,
        figsize=(1.9 * columns, (1.9 * height / width + 0.3) * len(found)),
        squeeze=False,
        layout="constrained",
    )
    grey = image.float().mean(2)
    for line, (name, maps) in zip(grid, found.items(), strict=True):
        line[0].imshow(image / 255)
        line[0].set_title(name, fontsize=8)
        for x1, y1, x2, y2 in boxes.tolist():
            line[0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="white"))
        top = max((cells.max().item() for cells in maps), default=1.0)
        total = sum(cells.square().sum().item() for cells in maps)
        for axes, cells in zip(line[1:], maps, strict=False):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            extent = (0, width, height, 0)
            axes.imshow(cells / top, cmap="inferno", vmin=0, vmax=1, alpha=0.75, extent=extent)
            share = cells.square().sum().item() / total
            rows, across = cells.shape
            axes.set_title(f"{rows}x{across} cells: {share:.0%}", fontsize=7)
    for axes in grid.flat:
        axes.axis("off")
    write_picture(figure, path, dpi=80, bbox_inches="tight", pil_kwargs={"optimize": True})


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, help="with KD.HEADS")
    parser.add_argument("--checkpoint", default="", help="written by a run with these heads")
    parser.add_argument("--output", type=output_file, required=True, help="the picture to write")
    parser.add_argument("--dataset", default="", help="default: the first of DATASETS.TEST")
    parser.add_argument("--index", type=whole(), default=0, help="of the image in the data set")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> None:
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg)
    if not cfg.KD.HEADS:
        raise ConfigError("--config-file: KD.HEADS is empty, there is nothing to show")
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    example = load_example(cfg, dataset, args.index)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    model = build_training_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_detector(model.student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    if args.checkpoint:
        load_run(model, args.checkpoint, "--checkpoint")
    with undisturbed(model):
        found = pulls(model, example, cfg.SOLVER.MAX_ITER - 1)
    image = example["image"] if cfg.INPUT.FORMAT == "RGB" else example["image"].flip(0)
    boxes = example["instances"].gt_boxes.tensor
    draw(args.output, image.permute(1, 2, 0), boxes, found)
    for name, maps in found.items():
        print(f"{name}: {len(maps)} maps with a gradient")
    print(f"{args.output}: image {args.index} of {dataset}")
