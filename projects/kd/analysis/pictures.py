"""Pictures of results: AP bars, AP curves, and detections side by side."""

from __future__ import annotations

import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import cv2
import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.patches import Patch, Rectangle
from pycocotools import mask as mask_util

from ..errors import ConfigError
from ..evaluation.pictures import MIN_SCORE

_COLOURS = plt.get_cmap("tab10").colors


def ap_bars(rows: Sequence[Mapping], path: str, title: str = "", metric: str = "AP") -> None:
    """Bars of AP (or another metric) with one point for each seed."""
    names = [row["name"] for row in rows]
    figure, axes = plt.subplots(figsize=(1.8 + 1.1 * len(rows), 4))
    heights = [row[metric] or 0.0 for row in rows]
    axes.bar(names, heights, color=[_COLOURS[i % 10] for i in range(len(rows))], alpha=0.85)
    for i, row in enumerate(rows):
        points = row.get(f"{metric}_seeds", [])
        axes.plot([i] * len(points), points, "k.", markersize=5)
        top = max([heights[i], *points])
        axes.annotate(
            f"{heights[i]:.1f}", (i, top), (0, 6), ha="center", textcoords="offset points"
        )
    axes.set_ylabel(metric)
    axes.set_title(textwrap.fill(title, 20 + 10 * len(rows)), fontsize=10)
    axes.margins(y=0.12)
    plt.setp(axes.get_xticklabels(), rotation=25, ha="right")
    _save(figure, path)


def ap_against_latency(rows: Sequence[Mapping], path: str) -> None:
    """A point for each detector whose AP is known.

    Args:
        rows: of :func:`~projects.kd.analysis.latency.report`.
        path: of the picture.
    """
    figure, axes = plt.subplots(figsize=(6, 4))
    for i, row in enumerate(row for row in rows if row["ap"] is not None):
        ms = row["ms"]
        spread = [[ms["median"] - ms["low"]], [ms["high"] - ms["median"]]]
        axes.errorbar(ms["median"], row["ap"], xerr=spread, fmt="o", color=_COLOURS[i % 10])
        axes.annotate(row["name"], (ms["median"], row["ap"]), (6, 6), textcoords="offset points")
    axes.set_xlabel("ms an image")
    axes.set_ylabel("AP")
    axes.margins(0.2)
    axes.set_xlim(left=0)
    _save(figure, path)


def ap_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: str, metric: str = "AP"
) -> None:
    """A metric against iterations; ``curves`` maps a name to (iteration, value) points."""
    _save(_curves_figure(curves, metric), path)


def ap_curves_svg(curves: Mapping[str, Sequence[tuple[int, float]]], metric: str = "AP") -> str:
    """The picture of :func:`ap_curves` as an ``<svg>`` element for a page."""
    figure = _curves_figure(curves, metric)
    figure.tight_layout()
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "curves"}):  # the same curves, the same bytes
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]], metric: str):
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for i, (name, points) in enumerate(curves.items()):
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, color=_COLOURS[i % 10])
    axes.set_xlabel("iteration")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def cost_scatter(points: Mapping[str, tuple[float, float]], path: str, metric: str) -> None:
    """A metric against cost.

    Args:
        points: name to (time of an iteration relative to the plain student's, metric).
        path: the picture to write.
        metric: its name.
    """
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for i, (name, (cost, value)) in enumerate(points.items()):
        axes.plot(cost, value, "osD^"[i // 10 % 4], color=_COLOURS[i % 10], label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    axes.set_xlabel("time of a training iteration / plain student's")
    axes.set_ylabel(metric)
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.3)
    _save(figure, path)


def label_maps_side_by_side(
    dataset: str, results: Mapping[str, str], path: str, num_images: int = 4
) -> None:
    """One line an image: the image, its label map, then the prediction of each model.

    Pixels without a class are black. A legend names the classes that occur in the label maps.

    Args:
        dataset: a registered data set with label maps.
        results: column name to a ``sem_seg_predictions.json`` of detectron2's evaluator.
        path: the picture to write.
        num_images: lines; the images are those with the most classes among evenly spaced ones.
    """
    metadata = MetadataCatalog.get(dataset)
    count, ignore = len(metadata.stuff_classes), metadata.ignore_label
    records = DatasetCatalog.get(dataset)
    parts = np.array_split(np.arange(len(records)), min(num_images, len(records)))
    chosen = []
    for part in parts:
        some = [records[i] for i in part[:8]]
        chosen.append(max(some, key=lambda r: len(np.unique(_labels(r["sem_seg_file_name"])))))
    to_class = metadata.get("stuff_dataset_id_to_contiguous_id", {})
    columns = {
        name: _predicted_maps(file, {r["file_name"] for r in chosen}, to_class)
        for name, file in results.items()
    }
    width = 2 + len(columns)
    figure, grid = plt.subplots(
        len(chosen), width, figsize=(2.4 * width, 2.4 * len(chosen)), squeeze=False
    )
    for line, record in zip(grid, chosen, strict=True):
        truth = _labels(record["sem_seg_file_name"])
        maps = [truth, *(columns[name].get(record["file_name"]) for name in columns)]
        line[0].imshow(cv2.imread(record["file_name"])[..., ::-1])
        for axes, labels in zip(line[1:], maps, strict=True):
            if labels is not None:
                axes.imshow(_coloured(labels, count, ignore))
    for axes in grid.ravel():
        axes.axis("off")
    for axes, name in zip(grid[0], ["image", "label", *columns], strict=True):
        axes.set_title(name, fontsize=10)
    seen = sorted({c for r in chosen for c in np.unique(_labels(r["sem_seg_file_name"])).tolist()})
    patches = [
        Patch(color=_class_colours(count)[c], label=metadata.stuff_classes[c])
        for c in seen
        if c < count and c != ignore
    ]
    legend = figure.legend(handles=patches, loc="lower center", ncols=8, fontsize=8)
    _save(figure, path, below=legend)


def _labels(file: str) -> np.ndarray:
    return cv2.imread(file, cv2.IMREAD_GRAYSCALE)


def _predicted_maps(file: str, wanted: set[str], to_class: Mapping[int, int]) -> dict:
    """Image file to its label map (H, W), from run-length masks of classes."""
    found: dict = {}
    with open(file) as handle:
        for item in json.load(handle):
            if item["file_name"] in wanted:
                mask = mask_util.decode(item["segmentation"]).astype(bool)
                labels = found.setdefault(item["file_name"], np.full(mask.shape, 255, np.uint8))
                labels[mask] = to_class.get(item["category_id"], item["category_id"])
    return found


def _class_colours(count: int) -> np.ndarray:
    """(count, 3) in 0..1."""
    return plt.get_cmap("tab20")(np.arange(count) % 20)[:, :3]


def _coloured(labels: np.ndarray, count: int, ignore: int) -> np.ndarray:
    """(H, W) labels to (H, W, 3) in 0..1."""
    picture = _class_colours(count)[np.minimum(labels, count - 1)]
    picture[(labels == ignore) | (labels >= count)] = 0.0
    return picture


def detections_side_by_side(
    dataset: str,
    results: Mapping[str, str],
    path: str,
    num_images: int = 4,
    threshold: float = MIN_SCORE,
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


def data_set_entry(dataset: str, index: int) -> dict:
    """One detectron2 dict, as a tool's ``--dataset`` and ``--index`` ask for it.

    Raises:
        ConfigError: the data set is not registered, or has no such image.
    """
    if dataset not in DatasetCatalog.list():
        raise ConfigError(f"--dataset: '{dataset}' is not registered")
    entries = DatasetCatalog.get(dataset)
    if not 0 <= index < len(entries):
        raise ConfigError(f"--index: {index} is not in 0 .. {len(entries) - 1}")
    return entries[index]


def write_picture(figure, path: str, **options) -> None:
    """Write a figure where a tool's ``--output`` says, and close it.

    Args:
        figure: of matplotlib.
        path: the picture; its folder is made.
        **options: of ``savefig``.

    Raises:
        ConfigError: it cannot be written.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        figure.savefig(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output: {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _save(figure, path: str, below=None) -> None:
    """Write a figure; ``below`` is a legend at its lower edge that the axes make room for."""
    height = 0.0
    if below is not None:
        figure.canvas.draw()
        height = below.get_window_extent().height / figure.bbox.height
    figure.tight_layout(rect=(0, height, 1, 1))
    root, extension = os.path.splitext(path)
    temporary = f"{root}.tmp{os.getpid()}{extension}"  # two comparisons may share a folder
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, path)
