"""Pictures by object size: a histogram of a data set, and detections in COCO's size bands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import cv2
import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.patches import Rectangle

from ..errors import ConfigError
from ..evaluation.visdrone_metrics import ignored_pixels, outside_ignored, overlaps
from .pictures import write_picture

# COCO's bands, by the square root of the box's area in pixels of the stored image
BANDS = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, float("inf"))}
_FOUND, _MISSED, _FALSE = "#00d0ff", "#ff3030", "#ffb000"


def objects_of(entry: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) boxes XYWH in pixels and (N,) classes of a detectron2 dict, crowds left out."""
    kept = [a for a in entry["annotations"] if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in kept]
    labels = np.array([a["category_id"] for a in kept], int)
    return np.array(boxes, float).reshape(-1, 4), labels


def size_histogram(dataset: str, path: str) -> dict[str, float]:
    """Histogram of the square root of the boxes' areas, and of the sizes by class.

    Args:
        dataset: a registered data set with boxes.
        path: the picture to write.

    Returns:
        The share of each of BANDS.
    """
    pairs = [objects_of(entry) for entry in DatasetCatalog.get(dataset)]
    if not sum(len(boxes) for boxes, _ in pairs):
        raise ConfigError(f"--dataset: '{dataset}' has no boxes")
    boxes, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    sizes = np.sqrt(boxes[:, 2] * boxes[:, 3])
    shares = {
        name: float(((sizes >= low) & (sizes < high)).mean()) for name, (low, high) in BANDS.items()
    }
    names = MetadataCatalog.get(dataset).thing_classes
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    edges = np.geomspace(max(sizes.min() * 0.99, 1.0), sizes.max() * 1.01, 41)
    left.hist(sizes, edges, color="#4477aa")
    for limit in (32, 96):
        left.axvline(limit, color="black", linewidth=1, linestyle="--")
    left.set_xlabel("square root of the box area, pixels")
    left.set_ylabel("objects")
    listed = ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares.items())
    left.set_title(f"{dataset}: {len(sizes)} objects, {listed}", fontsize=10)
    present = [i for i in range(len(names)) if (labels == i).any()]
    right.boxplot(
        [sizes[labels == i] for i in present],
        orientation="horizontal",
        showfliers=False,
        tick_labels=[f"{names[i]} ({(labels == i).sum()})" for i in present],
    )
    right.invert_yaxis()
    ticks = [t for t in (2, 4, 8, 16, 32, 96, 256, 512, 1024) if edges[0] < t < edges[-1]]
    for axes in (left, right):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [str(t) for t in ticks])
    right.set_xlabel("quartiles of the square root, pixels")
    figure.tight_layout()
    write_picture(figure, path, dpi=110)
    return shares


def detections_by_size(
    dataset: str, results: str, path: str, num_images: int = 3, threshold: float = 0.3
) -> dict[str, tuple[int, int, int]]:
    """One line an image, one column a size band: objects found and missed, false detections.

    Objects are matched at IoU 0.5 within their class, greedily by score; a false detection is
    shown in the band of its own size, and not at all in an ignored region.

    Args:
        dataset: a registered data set with boxes.
        results: a COCO results file (boxes XYWH in pixels of the stored image).
        path: the picture to write.
        num_images: the images with the most objects.
        threshold: detections below this score are not drawn, nor matched.

    Returns:
        Band to (found, missed, false) in the images shown.
    """
    entries = sorted(DatasetCatalog.get(dataset), key=lambda e: -len(e["annotations"]))
    metadata = MetadataCatalog.get(dataset)
    found = _read_results(results, metadata.thing_dataset_id_to_contiguous_id, threshold)
    chosen = entries[:num_images]
    if not chosen:
        raise ConfigError(f"--dataset: '{dataset}' has no images")
    figure, grid = plt.subplots(
        len(chosen), len(BANDS), figsize=(5 * len(BANDS), 3.4 * len(chosen)), squeeze=False
    )
    counts = {name: np.zeros(3, int) for name in BANDS}
    for line, entry in zip(grid, chosen, strict=True):
        image = cv2.imread(entry["file_name"])[..., ::-1]
        groups = _outcomes(entry, found.get(entry["image_id"], np.zeros((0, 6))))
        for axes, (name, (low, high)) in zip(line, BANDS.items(), strict=True):
            axes.imshow(image)
            axes.axis("off")
            for x, y, w, h in entry.get("ignored_regions", []):
                shade = {"facecolor": (0, 0, 0, 0.5), "edgecolor": "yellow", "linewidth": 0.6}
                axes.add_patch(Rectangle((x, y), w, h, **shade))
            shown = []
            for boxes, colour in zip(groups, (_FOUND, _MISSED, _FALSE), strict=True):
                sizes = np.sqrt(boxes[:, 2] * boxes[:, 3])
                inside = boxes[(sizes >= low) & (sizes < high)]
                shown.append(len(inside))
                for x, y, w, h in inside:
                    frame = Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=0.9)
                    axes.add_patch(frame)
            counts[name] += shown
            axes.set_title("{}: {} found, {} missed, {} false".format(name, *shown), fontsize=9)
    figure.suptitle("found: blue, missed: red, false: orange; ignored regions are dark", fontsize=9)
    figure.tight_layout()
    write_picture(figure, path, dpi=110)
    return {name: tuple(values.tolist()) for name, values in counts.items()}


def _read_results(path: str, to_class: Mapping[int, int], threshold: float) -> dict:
    """Image id to (D, 6): box XYWH, class, score, the best first."""
    try:
        with open(path) as stream:
            items = json.load(stream)
        rows: dict = {}
        for item in items:
            if item["score"] >= threshold:
                row = [*item["bbox"], to_class[item["category_id"]], item["score"]]
                rows.setdefault(item["image_id"], []).append(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--results: {path} is no COCO results file: {error!r}") from error
    return {key: np.array(sorted(value, key=lambda r: -r[5])) for key, value in rows.items()}


def _outcomes(entry: Mapping, rows: np.ndarray) -> Sequence[np.ndarray]:
    """Boxes of found and missed objects, and of false detections outside of ignored regions."""
    truth, labels = objects_of(entry)
    counts = ignored_pixels(entry.get("ignored_regions", []), entry["height"], entry["width"])
    rows = rows[outside_ignored(rows[:, :4], counts)]
    iou = overlaps(rows[:, :4], truth) * (rows[:, 4:5] == labels)
    found = np.zeros(len(truth), bool)
    wrong = np.ones(len(rows), bool)
    for number, values in enumerate(iou):
        values = np.where(found, 0.0, values)
        if len(values) and values.max() >= 0.5:
            found[values.argmax()] = True
            wrong[number] = False
    return truth[found], truth[~found], rows[wrong][:, :4]
