"""The built-in data sets ``shapes_train``, ``shapes_few``, ``shapes_dev`` and ``shapes_val``.

They are made on first use, without a download. ``shapes_few`` holds the first 300 pictures of
``shapes_train``. ``shapes_three_train`` and ``shapes_three_val`` are the pictures of ``train`` and
``val`` with the objects of three classes annotated, in another order (THREE), and without label
maps, for students of teachers that know more classes. Recipes are tuned on ``shapes_dev``, results
are reported on ``shapes_val``. They lie in
``$DETECTRON2_DATASETS/shapes/v<VERSION>/{train,few,dev,val}`` (default: ``./datasets``)::

    images/000000.jpg ...      256x256, 256x320 or 320x256 pixels
    semantic/000000.png ...    one byte a pixel: 0 = background, 1 + class index
    instances.json             COCO format: boxes, polygons, four keypoints an object

and ``$DETECTRON2_DATASETS/shapes/v<VERSION>/three_{train,val}/instances.json``.

What is drawn, and which objects are annotated, is said in :mod:`.scene`. Each picture has its own
seed, so the content does not depend on the machine, the order, or the number of threads.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import DataError
from ..files import write_atomically
from .scene import CLASSES, KEYPOINTS, make_scene

VERSION = 1  # count up with every change of what scene.py or paint.py draw
SPLITS = {"train": 1500, "few": 300, "val": 200, "dev": 200}  # number of images
THREE = ("mushroom", "drop", "arrow")
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
        _describe(name, folder, folder, CLASSES)
        MetadataCatalog.get(name).set(
            sem_seg_root=os.path.join(folder, "semantic"),
            stuff_classes=["background", *CLASSES],
            ignore_label=255,
        )
    for split in ("train", "val"):
        name = f"shapes_three_{split}"
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, lambda n=name, s=split: _load_three(n, s))
            _describe(name, split_folder(f"three_{split}"), split_folder(split), THREE)


def _describe(name: str, folder: str, pictures: str, classes: Sequence[str]) -> None:
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        made_on_first_use=True,
        json_file=os.path.join(folder, "instances.json"),
        image_root=os.path.join(pictures, "images"),
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(classes))},
        keypoint_names=list(KEYPOINTS),
        keypoint_flip_map=list(KEYPOINT_FLIP_MAP),
        keypoint_connection_rules=[
            (*limb, colour) for limb, colour in zip(_LIMBS, _LIMB_COLOURS, strict=True)
        ],
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


def _load_three(name: str, split: str) -> list[dict]:
    """Those of a split, with the annotations of THREE; writes their file if it is missing."""
    pictures = split_folder(split)
    generate(split, pictures)
    json_file = MetadataCatalog.get(name).json_file
    if not os.path.isfile(json_file):
        with open(os.path.join(pictures, "instances.json")) as stream:
            content = only(json.load(stream), THREE)
        folder = os.path.dirname(json_file)
        with _unwritable(folder):
            os.makedirs(folder, exist_ok=True)
            with file_lock(folder):  # of several processes one after another
                write_atomically(json_file, json.dumps(content))
    return load_coco_json(json_file, os.path.join(pictures, "images"), name)


def only(content: dict, classes: Sequence[str]) -> dict:
    """COCO content with all images and the annotations of some classes, renumbered in that order.

    Args:
        content: images, annotations and categories.
        classes: names of categories; the first gets the id 1.
    """
    by_name = {category["name"]: category for category in content["categories"]}
    ids = {by_name[name]["id"]: place for place, name in enumerate(classes, start=1)}
    annotations = [
        {**x, "category_id": ids[x["category_id"]]}
        for x in content["annotations"]
        if x["category_id"] in ids
    ]
    categories = [{**by_name[x], "id": place} for place, x in enumerate(classes, start=1)]
    return {**content, "annotations": annotations, "categories": categories}


@contextlib.contextmanager
def _unwritable(place: str):
    """OSError becomes a DataError that names the place."""
    try:
        yield
    except OSError as error:
        shown = f"{place}: the built-in data cannot be written here ({error.strerror or error})"
        raise DataError(f"{shown}; set DETECTRON2_DATASETS to a writable folder") from error


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
    with _unwritable(folder):
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
