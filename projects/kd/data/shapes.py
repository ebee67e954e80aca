"""The built-in data sets ``shapes_train``, ``shapes_few``, ``shapes_dev`` and ``shapes_val``.

They are made on first use, without a download. ``shapes_few`` holds the first 300 pictures of
``shapes_train``. Recipes are tuned on ``shapes_dev``, results are reported on ``shapes_val``. They
lie in ``$DETECTRON2_DATASETS/shapes/v<VERSION>/{train,few,dev,val}`` (default: ``./datasets``)::

    images/000000.jpg ...      256x256, 256x320 or 320x256 pixels
    semantic/000000.png ...    one byte a pixel: 0 = background, 1 + class index
    instances.json             COCO format: boxes, polygons, four keypoints an object

What is drawn, and which objects are annotated, is said in :mod:`.scene`. Each picture has its own
seed, so the content does not depend on the machine, the order, or the number of threads.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import DataError
from .scene import CLASSES, KEYPOINTS, make_scene

VERSION = 1  # count up with every change of what scene.py or paint.py draw
SPLITS = {"train": 1500, "few": 300, "val": 200, "dev": 200}  # number of images
KEYPOINT_FLIP_MAP = [("left", "right")]

_LIMBS = [("top", "left"), ("top", "right"), ("left", "bottom"), ("right", "bottom")]
_LIMB_COLOURS = [(255, 128, 0), (0, 128, 255), (255, 128, 0), (0, 128, 255)]
_SEEDS = {"train": 1, "few": 1, "val": 2, "dev": 3}  # equal seeds give equal pictures
_JPEG_QUALITY = 92
_logger = logging.getLogger(__name__)


def register_shapes() -> None:
    """Register the splits; does nothing for names registered already."""
    for split in SPLITS:
        name = f"shapes_{split}"
        if name in DatasetCatalog.list():
            continue
        folder = split_folder(split)
        DatasetCatalog.register(name, lambda n=name, s=split, f=folder: _load(n, s, f))
        MetadataCatalog.get(name).set(
            evaluator_type="coco",
            made_on_first_use=True,
            json_file=os.path.join(folder, "instances.json"),
            image_root=os.path.join(folder, "images"),
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
            keypoint_names=list(KEYPOINTS),
            keypoint_flip_map=list(KEYPOINT_FLIP_MAP),
            keypoint_connection_rules=[
                (*limb, colour) for limb, colour in zip(_LIMBS, _LIMB_COLOURS, strict=True)
            ],
            sem_seg_root=os.path.join(folder, "semantic"),
            stuff_classes=["background", *CLASSES],
            ignore_label=255,
        )


def split_folder(split: str) -> str:
    """Where a split lies or will lie."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.abspath(os.path.join(root, "shapes", f"v{VERSION}", split))


def _load(name: str, split: str, folder: str) -> list[dict]:
    """detectron2 dicts of one split, with ``sem_seg_file_name``; makes the files if missing."""
    generate(split, folder)
    image_root = os.path.join(folder, "images")
    dicts = load_coco_json(os.path.join(folder, "instances.json"), image_root, name)
    for entry in dicts:
        stem = os.path.splitext(os.path.basename(entry["file_name"]))[0]
        entry["sem_seg_file_name"] = os.path.join(folder, "semantic", stem + ".png")
    return dicts


def generate(split: str, folder: str, count: int | None = None) -> None:
    """Make a split unless its folder exists.

    The files are written to a temporary folder that is renamed at the end, so a folder that exists
    is complete. A second process waits for the first.

    Args:
        split: one of SPLITS; decides the seeds.
        folder: where to put it.
        count: number of images; the split's own by default.

    Raises:
        DataError: the folder cannot be written.
    """
    if os.path.isdir(folder):
        return
    parent, base = os.path.split(folder)
    try:
        os.makedirs(parent, exist_ok=True)
        with file_lock(folder):
            if os.path.isdir(folder):
                return
            for left_over in glob.glob(os.path.join(glob.escape(parent), f".{base}-*")):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
            _logger.info("making the built-in data set in %s", folder)
            with tempfile.TemporaryDirectory(prefix=f".{base}-", dir=parent) as scratch:
                unfinished = os.path.join(scratch, base)
                _write_split(split, unfinished, SPLITS[split] if count is None else count)
                os.replace(unfinished, folder)
    except OSError as error:
        shown = f"{folder}: the built-in data cannot be written here ({error.strerror or error})"
        raise DataError(f"{shown}; set DETECTRON2_DATASETS to a writable folder") from error


def _write_split(split: str, folder: str, count: int) -> None:
    for sub in ("images", "semantic"):
        os.makedirs(os.path.join(folder, sub))

    def make(index: int):
        scene = make_scene((_SEEDS[split], index))
        stem = f"{index:06d}"
        image_file = os.path.join(folder, "images", stem + ".jpg")
        _write_image(image_file, scene.image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        _write_image(os.path.join(folder, "semantic", stem + ".png"), scene.semantic, [])
        return stem + ".jpg", scene.semantic.shape, scene.annotations

    images, annotations = [], []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = tqdm(pool.map(make, range(count)), f"making shapes_{split}", count, mininterval=1)
        for image_id, (file_name, (height, width), found) in enumerate(results, start=1):
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            for annotation in found:
                ids = {"id": len(annotations) + 1, "image_id": image_id}
                annotations.append(ids | annotation)
    skeleton = [[KEYPOINTS.index(a) + 1, KEYPOINTS.index(b) + 1] for a, b in _LIMBS]
    categories = [
        {"id": i, "name": name, "keypoints": KEYPOINTS, "skeleton": skeleton}
        for i, name in enumerate(CLASSES, start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    content["info"] = {"description": f"shapes_{split}", "version": str(VERSION)}
    with open(os.path.join(folder, "instances.json"), "w") as stream:
        json.dump(content, stream)


def _write_image(path: str, image, options: list[int]) -> None:
    ok, encoded = cv2.imencode(os.path.splitext(path)[1], image, options)
    if not ok:
        raise OSError(f"{path} cannot be encoded")
    with open(path, "wb") as stream:
        stream.write(encoded.tobytes())
