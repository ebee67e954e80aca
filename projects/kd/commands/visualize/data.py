"""Draw a contact sheet of a data set's ground truth: boxes, masks, keypoints and class names.

Ignored regions (VisDrone) are shaded.

    kd-visualize data --dataset shapes_train --output sheet.png
    kd-visualize data --dataset my_train --config-file my.yaml --output sheet.png

With --config-file, the data sets of its KD.DATASETS and KD.IMPORTS can be shown as well.
"""

from __future__ import annotations

import argparse
import difflib

import matplotlib
import numpy as np

matplotlib.use("Agg")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ...arguments import Parser, output_file, whole
from ...config import load_config
from ...data.images import read_image
from ...data.register import register_configured
from ...errors import ConfigError


def draw(entry: dict, metadata, size: int, semantic: bool, white: float = 0.0) -> np.ndarray:
    """One image with its ground truth, (size, size, 3) uint8 RGB, filled up with grey."""
    image = read_image(entry["file_name"], "RGB", white)
    scale = size / max(image.shape[:2])
    wanted = "sem_seg_file_name" if semantic else "annotations"
    if semantic and wanted not in entry:
        raise ConfigError(f"--semantic: there is no semantic map for {entry['file_name']}")
    visualizer = Visualizer(image, metadata, scale=scale)
    for x, y, w, h in entry.get("ignored_regions", []):
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        visualizer.draw_polygon(corners, "black", edge_color="yellow", alpha=0.6)
        visualizer.draw_text("ignored", (x + w / 2, y + h / 2), color="yellow")
    drawn = visualizer.draw_dataset_dict({wanted: entry.get(wanted)}).get_image()
    canvas = np.full((size, size, 3), 128, np.uint8)
    height, width = (min(n, size) for n in drawn.shape[:2])
    canvas[:height, :width] = drawn[:height, :width]
    return canvas


def contact_sheet(
    name: str, num: int, columns: int, size: int, semantic: bool, white: float = 0.0
) -> np.ndarray:
    """``num`` images, evenly spaced over the data set, in rows of ``columns``; uint8 RGB."""
    entries = DatasetCatalog.get(name)
    if not entries:
        raise ConfigError(f"--dataset: '{name}' has no images")
    chosen = np.linspace(0, len(entries) - 1, min(num, len(entries))).round().astype(int)
    metadata = MetadataCatalog.get(name)
    cells = [draw(entries[i], metadata, size, semantic, white) for i in chosen]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument(
        "--output", type=output_file, required=True, help="the picture to write (.png or .jpg)"
    )
    parser.add_argument("--num", type=whole(1), default=12, help="number of images")
    parser.add_argument("--columns", type=whole(1), default=4)
    parser.add_argument("--size", type=whole(1), default=400, help="pixels of a cell's side")
    parser.add_argument("--semantic", action="store_true", help="the semantic map instead")
    parser.add_argument("--config-file", default="", help="config with KD.DATASETS or KD.IMPORTS")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> None:
    if args.opts and not args.config_file:
        raise ConfigError(f"{args.opts[0]}: overrides need --config-file")
    white = 0.0
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
        register_configured(cfg)
        white = cfg.INPUT.WHITE
    if args.dataset not in DatasetCatalog.list():
        near = difflib.get_close_matches(args.dataset, DatasetCatalog.list(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--dataset: '{args.dataset}' is not registered{hint}")
    np.random.seed(0)  # detectron2 draws its colours from here
    sheet = contact_sheet(args.dataset, args.num, args.columns, args.size, args.semantic, white)
    try:
        Image.fromarray(sheet).save(args.output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output: {args.output} cannot be written: {error}") from error
    print(f"{args.output}: {sheet.shape[1]}x{sheet.shape[0]} pixels of {args.dataset}")
