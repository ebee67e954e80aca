"""Pictures of results: AP bars, AP curves, and detections side by side."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import cv2  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

_COLOURS = plt.get_cmap("tab10").colors


def ap_bars(rows: Sequence[Mapping], path: str, title: str = "") -> None:
    """Bars of AP with one point for each seed."""
    names = [row["name"] for row in rows]
    figure, axes = plt.subplots(figsize=(1.8 + 1.1 * len(rows), 4))
    heights = [row["AP"] or 0.0 for row in rows]
    axes.bar(names, heights, color=[_COLOURS[i % 10] for i in range(len(rows))], alpha=0.85)
    for i, row in enumerate(rows):
        points = row.get("AP_seeds", [])
        axes.plot([i] * len(points), points, "k.", markersize=5)
        top = max([heights[i], *points])
        axes.annotate(
            f"{heights[i]:.1f}", (i, top), (0, 6), ha="center", textcoords="offset points"
        )
    axes.set_ylabel("AP")
    axes.set_title(textwrap.fill(title, 20 + 10 * len(rows)), fontsize=10)
    axes.margins(y=0.12)
    plt.setp(axes.get_xticklabels(), rotation=25, ha="right")
    _save(figure, path)


def ap_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: str) -> None:
    """AP against iterations; ``curves`` maps a name to (iteration, AP) points."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for i, (name, points) in enumerate(curves.items()):
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, color=_COLOURS[i % 10])
    axes.set_xlabel("iteration")
    axes.set_ylabel("AP")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def detections_side_by_side(
    dataset: str,
    results: Mapping[str, str],
    path: str,
    num_images: int = 4,
    threshold: float = 0.3,
) -> None:
    """One line an image: ground truth, then the detections of each model.

    Args:
        dataset: a registered data set with boxes.
        results: column name to a COCO results file (boxes XYWH in pixels of the stored image).
        path: the picture to write.
        num_images: lines; the images are those with the most objects among evenly spaced ones.
        threshold: detections below this score are not drawn.
    """
    records = _choose(DatasetCatalog.get(dataset), num_images)
    names = MetadataCatalog.get(dataset).thing_classes
    to_class = MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id
    columns = {name: _by_image(file, to_class, threshold) for name, file in results.items()}
    figure, grid = plt.subplots(
        len(records),
        1 + len(columns),
        figsize=(2.9 * (1 + len(columns)), 2.9 * len(records)),
        squeeze=False,
    )
    for line, record in zip(grid, records, strict=True):
        image = cv2.imread(record["file_name"])[..., ::-1]
        truth = [
            (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], None)
            for a in record["annotations"]
            if not a.get("iscrowd", 0)
        ]
        found = [columns[name].get(record["image_id"], []) for name in columns]
        for axes, boxes in zip(line, [truth, *found], strict=True):
            _draw(axes, image, boxes, names)
    for axes, name in zip(grid[0], ["ground truth", *columns], strict=True):
        axes.set_title(name, fontsize=10)
    _save(figure, path)


def _choose(records: Sequence[dict], count: int) -> list[dict]:
    """Of each of ``count`` equal parts of the data set the image with the most objects."""
    parts = np.array_split(np.arange(len(records)), min(count, len(records)))
    return [max((records[i] for i in part), key=lambda r: len(r["annotations"])) for part in parts]


def _by_image(file: str, to_class: Mapping[int, int], threshold: float) -> dict:
    found: dict = {}
    with open(file) as handle:
        for item in json.load(handle):
            if item["score"] >= threshold:
                x, y, w, h = item["bbox"]
                box = ((x, y, x + w, y + h), to_class[item["category_id"]], item["score"])
                found.setdefault(item["image_id"], []).append(box)
    return found


def _draw(axes, image: np.ndarray, boxes, names: Sequence[str]) -> None:
    axes.imshow(image)
    axes.axis("off")
    for (x1, y1, x2, y2), label, score in boxes:
        colour = _COLOURS[label % 10]
        frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.3)
        axes.add_patch(frame)
        text = names[label] if score is None else f"{names[label]} {score:.2f}"
        style = {"facecolor": colour, "alpha": 0.75, "pad": 0.6, "edgecolor": "none"}
        axes.text(x1, y1, text, fontsize=5, color="white", bbox=style, va="bottom")


def _save(figure, path: str) -> None:
    figure.tight_layout()
    root, extension = os.path.splitext(path)
    temporary = f"{root}.tmp{extension}"
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, path)
