"""Draw what an ICD run distils in one image: where it looks, and what the training changed.

    kd-visualize distill --config-file output/retinanet_icd/config.yaml \\
        --checkpoint output/retinanet_icd/model_final.pth --output icd.png

Rows of the picture, one column for each level of the pyramid:

  the objects of the image, and the mask of FGFI
  for each chosen object, where the decoder's heads (their mean) look for it in the teacher
  distance of the student's values to the teacher's (2 (1 - correlation), 0 to 2), before training
  the same after training

The checkpoint is one that training wrote: it holds the student and the decoder. "Before" is the
student at MODEL.WEIGHTS or, without, at the random start that SEED gives.
"""

from __future__ import annotations

import argparse

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from matplotlib.patches import Rectangle

from ... import build_training_model, check_config, load_config
from ...analysis.pictures import data_set_entry, write_picture
from ...arguments import Parser, output_file, whole
from ...data.mapper import build_annotated_mapper
from ...data.register import register_configured
from ...engine.inherit import inherit
from ...errors import ConfigError
from ...functional.icd import summed_attention
from ...functional.icd_values import token_distance
from ...heads.icd import fgfi_mask
from ...heads.icd_decoder import project
from ...teacher_building import paired_infos
from ...weights.loading import load_detector, load_run


def load_example(cfg, dataset: str, index: int) -> dict:
    """One image of a data set at test size, with its annotations."""
    entry = data_set_entry(dataset, index)
    example = build_annotated_mapper(cfg)(entry)
    if not len(example["instances"]):
        raise ConfigError(f"--index: image {index} of '{dataset}' has no objects")
    return example


class Views:
    """What the picture shows, computed on the model as it is now.

    Args:
        cfg: of the run.
        model: the training wrapper in eval mode.
        example: of :func:`load_example`.
    """

    @torch.no_grad()
    def __init__(self, cfg, model, example: dict):
        with EventStorage(1):  # nothing is logged in iteration 1
            self.ctx, _ = model.observe([example])
        self.head = model.heads["ICD"]
        self.levels = self.head.levels
        student, teacher = self.head.tokens(self.ctx)
        self.sizes = [cells.size for cells in student[0]]
        layer = self.head.decoder.layers[-1]
        own = project(self.head.student_values[-1], student[0], layer.heads)
        target = project(layer.value, teacher[0], layer.heads)
        self.distance = token_distance(own, target, self.head.center).mean(1)
        self.info = paired_infos(cfg, model.student, model.teacher, model.level_map)[0]
        self.teacher_tokens = teacher

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """(L,) to one (h, w) map a level."""
        areas = [h * w for h, w in self.sizes]
        return [p.view(size) for p, size in zip(tokens.split(areas), self.sizes, strict=True)]

    @torch.no_grad()
    def attention(self, chosen: list[int]) -> list[torch.Tensor]:
        """Per chosen object (L,), the mean over heads of the last layer, sum 1."""
        jitter, self.head.jitter = self.head.jitter, 0.0
        queries = self.head.queries(self.ctx)
        self.head.jitter = jitter
        counts = [sum(pair) for pair in queries.counts]
        *_, reads = self.head.decoder(queries.encoded.vectors, counts, self.teacher_tokens)
        read = reads[-1][0]
        return [summed_attention(read.queries[i : i + 1], read.keys).mean(0) for i in chosen]

    def mask(self, cfg) -> list[torch.Tensor]:
        """One (h, w) mask of FGFI a level, empty where the student has no anchors."""
        masks = fgfi_mask(cfg, self.info, self.levels, self.head.mask_padding).masks(self.ctx)
        return [
            masks[level][0, :h, :w].float() if level in masks else torch.zeros(h, w)
            for level, (h, w) in zip(self.levels, self.sizes, strict=True)
        ]


def choose(example: dict, wanted: list[int]) -> list[int]:
    """The objects to show: those asked for, or three of different size."""
    objects = example["instances"]
    if wanted:
        outside = [i for i in wanted if not 0 <= i < len(objects)]
        if outside:
            raise ConfigError(f"--objects: {outside[0]} is not in 0 .. {len(objects) - 1}")
        return wanted
    order = objects.gt_boxes.area().argsort().tolist()
    places = torch.linspace(0, len(order) - 1, min(3, len(order))).round().long()
    return [order[i] for i in places.tolist()]


def draw(path: str, image, objects, names, chosen, strides, mask, attention, distances) -> None:
    """Write the picture.

    Args:
        path: of the file.
        image: (H, W, 3) RGB, 0..255.
        objects: detectron2 Instances of the image.
        names: class names.
        chosen: indices of the objects with a row of their own.
        strides: level to stride.
        mask: one (h, w) map a level.
        attention: the same for each chosen object.
        distances: title to one (h, w) map a level.
    """
    height, width = image.shape[:2]
    rows = 1 + len(chosen) + len(distances)
    figure, grid = plt.subplots(
        rows,
        1 + len(strides),
        figsize=(2.4 * (1 + len(strides)), (2.4 * height / width + 0.35) * rows),
        squeeze=False,
        layout="constrained",
    )
    grey = image.float().mean(2)

    def show(axes, maps, top, title="", shares=False):
        for ax, cells, (level, stride) in zip(axes, maps, strides.items(), strict=True):
            rows, columns = cells.shape
            ax.imshow(grey, cmap="gray", vmin=0, vmax=255)
            extent = (0, columns * stride, rows * stride, 0)
            heat = ax.imshow(cells, cmap="viridis", vmin=0, vmax=top, alpha=0.6, extent=extent)
            ax.set(xlim=(0, width), ylim=(height, 0))
            label = (
                f"{level} {100 * cells.sum():.0f}%" if shares else f"{level}: {cells.mean():.2f}"
            )
            ax.set_title(title or label, fontsize=7)
        return heat

    def boxes(ax, indices):
        ax.imshow(image / 255)
        for i in indices:
            x1, y1, x2, y2 = objects.gt_boxes.tensor[i].tolist()
            colour = plt.get_cmap("tab10")(i % 10)
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour))
            text = f"{i} {names[objects.gt_classes[i]]}"
            style = {"facecolor": colour, "alpha": 0.75, "pad": 0.6, "edgecolor": "none"}
            ax.text(x1, y1, text, fontsize=5, color="white", bbox=style, va="bottom")

    boxes(grid[0][0], range(len(objects)))
    grid[0][0].set_title("objects | mask of FGFI", fontsize=7)
    show(grid[0][1:], mask, 1.0)
    for line, index, maps in zip(grid[1:], chosen, attention, strict=False):
        boxes(line[0], [index])
        line[0].set_title(f"ICD looks for object {index}", fontsize=7)
        show(line[1:], maps, max(cells.max().item() for cells in maps), shares=True)
    for line, (title, maps) in zip(grid[1 + len(chosen) :], distances.items(), strict=True):
        line[0].imshow(image / 255)
        line[0].set_title(title, fontsize=7)
        heat = show(line[1:], maps, 2.0)
    figure.colorbar(heat, ax=grid[-len(distances) :].ravel().tolist(), shrink=0.7, aspect=30)
    for ax in grid.flat:
        ax.axis("off")
    write_picture(figure, path, dpi=130, bbox_inches="tight")


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, help="of the run, with KD.HEADS (ICD,)")
    parser.add_argument("--checkpoint", required=True, help="written by the run")
    parser.add_argument("--output", type=output_file, required=True, help="the picture to write")
    parser.add_argument("--dataset", default="", help="default: the first of DATASETS.TEST")
    parser.add_argument("--index", type=whole(), default=0, help="of the image in the data set")
    parser.add_argument("--objects", type=whole(), nargs="*", default=[], help="default: three")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> None:
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg)
    if "ICD" not in cfg.KD.HEADS:
        raise ConfigError(f"--config-file: KD.HEADS {tuple(cfg.KD.HEADS)} has no ICD to show")
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    example = load_example(cfg, dataset, args.index)
    chosen = choose(example, args.objects)

    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)  # as training does before it builds the model
    model = build_training_model(cfg).eval()
    if cfg.MODEL.WEIGHTS:
        load_detector(model.student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    if cfg.KD.INIT_FROM_TEACHER:
        inherit(model.student, model.teacher.model, cfg.KD.INIT_FROM_TEACHER)
    before = Views(cfg, model, example)

    load_run(model, args.checkpoint, "--checkpoint")
    after = Views(cfg, model, example)

    attention = after.attention(chosen)
    weights = torch.stack(attention).mean(0)
    distances = {}
    for title, views in (("before", before), ("after", after)):
        mean, weighted = views.distance.mean(), (views.distance * weights).sum()
        line = f"{title}: mean {mean:.3f}, where ICD looks {weighted:.3f}"
        distances[line.replace(", ", "\n")] = views.split(views.distance)
        print(f"distance of values {line}")
    image = example["image"] if cfg.INPUT.FORMAT == "RGB" else example["image"].flip(0)
    draw(
        args.output,
        image.permute(1, 2, 0),
        example["instances"],
        MetadataCatalog.get(dataset).thing_classes,
        chosen,
        {level: after.ctx.stride(level) for level in after.levels},
        after.mask(cfg),
        [after.split(one) for one in attention],
        distances,
    )
    print(f"{args.output}: image {args.index} of {dataset}, objects {chosen}")
