"""Draw what a D3ETR run distils: matched queries, cross-attention, stability of the matching.

    kd-visualize d3etr --config-file configs/... --output d3etr.png \\
        --checkpoint output/.../model_final.pth
    kd-visualize d3etr --config-file configs/... \\
        --stability output/.../model_0000499.pth output/.../model_0000999.pth ... \\
        --output stability.png

The first form takes one image. Top row: boxes of the teacher's best queries (solid) and of the
student queries that adaptive matching pairs with them in the last layer (dashed, same colour),
before and after training. Further rows: where such a pair looks, the cross-attention of the last
layer averaged over heads, in the teacher, and in the student before and after. "Before" is the
student at MODEL.WEIGHTS or, without, at the random start that SEED gives.

The second form compares successive checkpoints of a run: the share of the teacher's queries that
get another student query, in each decoder layer, over some images. Fixed matching pairs query j
with query j, so its share is 0 by construction.
"""

from __future__ import annotations

import argparse
import json
import os

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from matplotlib.patches import Rectangle

from ... import build_training_model, check_config, load_config
from ...analysis.pictures import data_set_entry, write_picture
from ...arguments import Parser, output_file, whole
from ...data.mapper import ImageMapper, NamedErrors
from ...data.register import register_configured
from ...engine.inherit import inherit
from ...errors import ConfigError
from ...functional.set_prediction import cxcywh_to_xyxy
from ...levels import canvas_size
from ...weights.loading import load_detector

COLOURS = plt.get_cmap("tab10").colors


def load_example(cfg, dataset: str, index: int) -> dict:
    """One image of a data set at test size."""
    entry = data_set_entry(dataset, index)
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    mapper = ImageMapper(
        is_train=False,
        augmentations=[resize],
        image_format=cfg.INPUT.FORMAT,
        white=cfg.INPUT.WHITE,
    )
    return NamedErrors(mapper)(entry)


@torch.no_grad()
def decode_both(model, example: dict):
    """What student and teacher decode from one image, with attentions."""
    student = model.student.eval()
    images = student.preprocess_image([example])
    memory = student.encode(student.backbone(images.tensor), images)
    sizes = [tuple(example["image"].shape[-2:])]
    canvas = canvas_size(sizes, model.teacher.size_divisibility)
    observed = model.teacher.observe([example["image"]], canvas, model.image_format)
    return student.decode(memory, keep_attention=True), observed["decoded"]


def partners(head, student, teacher) -> list[torch.Tensor]:
    """Per student layer (Q_t,): the student query of each teacher query, -1 without one."""
    pairs = head.adaptive_pairs(student, teacher)
    table = torch.full((len(student.logits), teacher.logits.shape[2]), -1)
    return list(table.scatter_(1, pairs.teacher[:, 0].cpu(), pairs.student[:, 0].cpu()))


def load_student(model, path: str, key: str) -> None:
    missing = load_detector(model.student, path, key)
    if missing:
        raise ConfigError(f"{key}: {path} lacks {missing[0]} of the student")


def attention_of(decoded, query: int) -> torch.Tensor:
    """(rows, columns) of one query in the last layer, mean over heads."""
    return decoded.cross_attention[-1].map()[0, :, query].mean(0).view(decoded.memory.grid).cpu()


def draw_image(path: str, image, teacher, before, after, chosen, tables) -> None:
    """Write the picture of one image.

    Args:
        path: of the file.
        image: (H, W, 3) RGB, 0..255.
        teacher, before, after: what each decoded.
        chosen: teacher queries to show.
        tables: before and after, the student query of each teacher query.
    """
    height, width = image.shape[:2]
    figure, grid = plt.subplots(
        1 + len(chosen), 3, figsize=(8, 2.4 * (1 + len(chosen))), squeeze=False
    )

    def box(ax, decoded, query, colour, style):
        x1, y1, x2, y2 = cxcywh_to_xyxy(decoded.boxes[-1, 0, query]).cpu().tolist()
        corner, sides = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
        ax.add_patch(Rectangle(corner, *sides, fill=False, color=colour, linestyle=style))

    titles = ("teacher", "student before, matched", "student after, matched")
    students = (None, before, after)
    for ax, title, student, table in zip(grid[0], titles, students, (None, *tables), strict=True):
        ax.imshow(image / 255)
        ax.set_title(title, fontsize=8)
        for index, query in enumerate(chosen):
            colour = COLOURS[index % 10]
            box(ax, teacher, query, colour, "-")
            if student is not None:
                box(ax, student, int(table[query]), colour, "--")
    for line, query in zip(grid[1:], chosen, strict=True):
        maps = [attention_of(teacher, query)]
        maps += [
            attention_of(student, int(table[query]))
            for student, table in zip(students[1:], tables, strict=True)
        ]
        score = teacher.logits[-1, 0, query].sigmoid().max().item()
        for ax, cells, name in zip(line, maps, ("teacher", "before", "after"), strict=True):
            ax.imshow(image / 255)
            ax.imshow(cells, alpha=0.65, extent=(0, width, height, 0), cmap="viridis")
            ax.set_title(f"query {query} ({score:.2f}): {name}", fontsize=7)
    for ax in grid.flat:
        ax.axis("off")
    write_picture(figure, path, dpi=130, bbox_inches="tight")


def changes(cfg, model, dataset: str, checkpoints: list[str], images: int) -> torch.Tensor:
    """(checkpoints - 1, L) share of the teacher's queries whose partner changed."""
    head = model.heads["D3ETR"]
    count = min(images, len(DatasetCatalog.get(dataset)))
    examples = [load_example(cfg, dataset, index) for index in range(count)]
    previous, shares = None, []
    for path in checkpoints:
        load_student(model, path, "--stability")
        now = torch.stack(
            [torch.stack(partners(head, *decode_both(model, example))) for example in examples]
        )  # (images, L, Q_t)
        if previous is not None:
            known = (now >= 0) & (previous >= 0)
            changed = ((now != previous) & known).sum((0, 2)) / known.sum((0, 2)).clamp(min=1)
            shares.append(changed)
        previous = now
    return torch.stack(shares)


def draw_stability(path: str, shares: torch.Tensor, names: list[str]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for layer, values in enumerate(shares.T.tolist()):
        axes.plot(values, "o-", label=f"adaptive, layer {layer}")
    axes.plot([0.0] * len(shares), "k--", label="fixed (identity)")
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=20)
    axes.set_ylabel("share of pairs that change")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7)
    write_picture(figure, path, dpi=130, bbox_inches="tight")


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="of the run, with KD.HEADS (D3ETR,)")
    add("--checkpoint", default="", help="written by the run; for the picture of an image")
    add("--stability", nargs="+", default=[], help="two or more checkpoints, the oldest first")
    add("--output", type=output_file, required=True, help="the picture to write")
    add("--dataset", default="", help="default: the first of DATASETS.TEST")
    add("--index", type=whole(), default=0, help="of the image in the data set")
    add("--queries", type=whole(1), default=3, help="the teacher's best queries to show")
    add("--images", type=whole(1), default=20, help="for --stability")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(args) -> None:
    if bool(args.checkpoint) == bool(args.stability) or len(args.stability) == 1:
        raise ConfigError("give --checkpoint, or --stability with at least two checkpoints")
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg)
    if "D3ETR" not in cfg.KD.HEADS:
        raise ConfigError(f"--config-file: KD.HEADS {tuple(cfg.KD.HEADS)} has no D3ETR to show")
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    example = load_example(cfg, dataset, args.index)

    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)  # as training does before it builds the model
    model = build_training_model(cfg)
    if args.stability:
        shares = changes(cfg, model, dataset, args.stability, args.images)
        names = [os.path.splitext(os.path.basename(path))[0] for path in args.stability[1:]]
        draw_stability(args.output, shares, names)
        print(json.dumps(dict(zip(names, shares.tolist(), strict=True))))
        return
    if cfg.MODEL.WEIGHTS:
        load_detector(model.student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.KD.ALLOW_PICKLE)
    if cfg.KD.INIT_FROM_TEACHER:
        inherit(model.student, model.teacher.model, cfg.KD.INIT_FROM_TEACHER)
    head = model.heads["D3ETR"]
    before, teacher = decode_both(model, example)
    first = partners(head, before, teacher)[-1]
    load_student(model, args.checkpoint, "--checkpoint")
    after, _ = decode_both(model, example)
    last = partners(head, after, teacher)[-1]
    best = teacher.logits[-1, 0].amax(-1).argsort(descending=True).tolist()
    chosen = [q for q in best if first[q] >= 0 and last[q] >= 0][: args.queries]
    image = example["image"] if cfg.INPUT.FORMAT == "RGB" else example["image"].flip(0)
    tables = (first, last)
    draw_image(args.output, image.permute(1, 2, 0), teacher, before, after, chosen, tables)
    print(f"{args.output}: image {args.index} of {dataset}, teacher queries {chosen}")
