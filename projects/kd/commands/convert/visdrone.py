"""Convert VisDrone-DET to COCO format, and report what was found.

    kd-convert visdrone [--root FOLDER] [--splits train val test_dev] [--crops]

FOLDER (default: $DETECTRON2_DATASETS/visdrone, or ./datasets/visdrone) holds the official archives
unpacked: VisDrone2019-DET-{train,val,test-dev}/{images,annotations}. The archives stay as they are.
Written: FOLDER/annotations/visdrone_<split>.json, and with --crops the four quadrants of every
training image (QueryDet's training set) in FOLDER/train_crops. A file appears when it is complete;
what is there already and fits its source is not made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from PIL import Image
from tqdm import tqdm

from ...arguments import Parser, whole
from ...data import visdrone
from ...data.images import image_size
from ...errors import ConfigError, DataError

FORMAT = 1  # raised when the written files change
EXTENSIONS = (".jpg", ".jpeg", ".png")
NO_ANNOTATION = "images without an annotation file, left out"
NO_IMAGE = "annotation files without an image, left out"
CHUNK = 16


def convert(root: str, split: str, jobs: int, force: bool = False) -> dict:
    """Write the json of one split and return its content; an up-to-date one is only read."""
    source = os.path.join(root, visdrone.SPLITS[split])
    pairs, problems = find_files(source)
    target = visdrone.json_path(split, root)
    stamp = fingerprint([path for pair in pairs for path in pair], problems)
    if not force and (content := _up_to_date(target, stamp)):
        print(f"{target}: up to date")
        return content
    records = []
    for record, own in _parallel(convert_image, pairs, jobs, f"visdrone_{split}"):
        records.append(record)
        problems.update(own)
    content = visdrone.to_coco(records, {"fingerprint": stamp, **report(records, problems)})
    _write_json(target, content)
    print(f"{target}: written")
    return content


def convert_image(pair: tuple[str, str]) -> tuple[dict, visdrone.Problems]:
    """Record and problems of one (image, annotation file)."""
    image, annotations = pair
    name = os.path.basename(annotations)
    problems = visdrone.Problems()
    width, height = image_size(image)
    try:
        with open(annotations, encoding="utf-8", errors="replace", newline="") as stream:
            text = stream.read()
    except OSError as error:
        raise DataError(f"{annotations}: cannot be read: {error.strerror}") from error
    rows = visdrone.parse_annotations(text, name, problems)
    rows = visdrone.clip_rows(rows, width, height, name, problems)
    return visdrone.to_record(rows, os.path.basename(image), width, height), problems


def make_crops(root: str, jobs: int, force: bool = False) -> dict:
    """Write the quadrants of the training images and their json; returns its content."""
    with open(visdrone.json_path("train", root), encoding="utf-8") as stream:
        train = json.load(stream)
    target, folder = visdrone.json_path(visdrone.CROPS, root), visdrone.image_folder("train", root)
    stamp = train["info"]["fingerprint"]
    final = visdrone.image_folder(visdrone.CROPS, root)
    content = None if force else _up_to_date(target, stamp)
    if content and os.path.isdir(final):
        print(f"{target}: up to date")
        return content
    records = {image["id"]: {**image, "annotations": []} for image in train["images"]}
    for annotation in train["annotations"]:
        own = {k: v for k, v in annotation.items() if k not in ("id", "image_id")}
        records[annotation["image_id"]]["annotations"].append(own)
    unfinished = final + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    task = functools.partial(_cut_image, folder=folder, output=unfinished)
    crops = []
    for made in _parallel(task, list(records.values()), jobs, "visdrone_train_crops"):
        crops += made
    content = visdrone.to_coco(crops, {"fingerprint": stamp, **report(crops, visdrone.Problems())})
    if os.path.exists(target):
        os.remove(target)  # the old json must not name new images
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)
    _write_json(target, content)
    print(f"{target}: written, images in {final}")
    return content


def _cut_image(record: dict, folder: str, output: str) -> list[dict]:
    path = os.path.join(folder, record["file_name"])
    made = []
    try:
        with Image.open(path) as opened:
            pixels = opened.convert("RGB")
        for frame, quadrant in visdrone.quadrants({k: v for k, v in record.items() if k != "id"}):
            # quality 95 as OpenCV's default, with which QueryDet writes its crops
            pixels.crop(frame).save(os.path.join(output, quadrant["file_name"]), quality=95)
            made.append(quadrant)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: quadrants cannot be made: {error}") from error
    return made


def find_files(source: str) -> tuple[list[tuple[str, str]], visdrone.Problems]:
    """(image, annotation file) by name, and what lacks its partner.

    Raises:
        DataError: a folder is missing, or no image has an annotation file.
    """
    found = {}
    for kind, extensions in (("images", EXTENSIONS), ("annotations", (".txt",))):
        folder = os.path.join(source, kind)
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder; unpack the official archive there")
        found[kind] = {
            os.path.splitext(name)[0]: os.path.join(folder, name)
            for name in sorted(os.listdir(folder))
            if name.lower().endswith(extensions)
        }
    images, annotations = found["images"], found["annotations"]
    problems = visdrone.Problems()
    for stem in sorted(images.keys() - annotations.keys()):
        problems.add(NO_ANNOTATION, os.path.basename(images[stem]))
    for stem in sorted(annotations.keys() - images.keys()):
        problems.add(NO_IMAGE, os.path.basename(annotations[stem]))
    pairs = [(images[stem], annotations[stem]) for stem in images if stem in annotations]
    if not pairs:
        raise DataError(f"{source}: no image has an annotation file of its name")
    return pairs, problems


def fingerprint(paths: list[str], problems: visdrone.Problems) -> str:
    """Changes with the names, sizes and times of the files, with FORMAT, and what is lacking."""
    digest = hashlib.sha256(f"format {FORMAT} {sorted(problems.counts.items())}".encode())
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        line = f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def report(records: list[dict], problems: visdrone.Problems) -> dict:
    """What the json's ``info`` keeps."""
    classes: Counter = Counter()
    for record in records:
        kept = [a for a in record["annotations"] if not a["iscrowd"]]
        classes.update(visdrone.CLASSES[a["category_id"] - 1] for a in kept)
    return {
        "images": len(records),
        "images without boxes": sum(
            all(a["iscrowd"] for a in record["annotations"]) for record in records
        ),
        "boxes": sum(classes.values()),
        "boxes by class": {name: classes[name] for name in visdrone.CLASSES},
        "ignored regions": sum(len(record["ignored_regions"]) for record in records),
        "ignored objects": sum(a["iscrowd"] for r in records for a in r["annotations"]),
        "others": sum(len(record["others"]) for record in records),
        "problems": dict(problems.counts),
        "first of each problem": problems.first,
    }


def print_report(split: str, info: dict) -> None:
    print(f"visdrone_{split}:")
    for key, value in info.items():
        if key in ("images", "images without boxes", "boxes", "ignored regions", "others"):
            print(f"  {value:>8} {key}")
        elif key == "ignored objects":
            print(f"  {value:>8} objects of score 0")
        elif key == "boxes by class":
            for name, count in value.items():
                print(f"  {count:>8}   {name}")
    for problem, count in info["problems"].items():
        print(f"  {count:>8} {problem}; first: {info['first of each problem'][problem]}")
    if not info["problems"]:
        print("           no problems")


def _parallel(task, items: list, jobs: int, name: str):
    """Results in the order of the items, with a progress bar."""
    bar = functools.partial(tqdm, total=len(items), desc=name, mininterval=1.0)
    if jobs == 1:
        yield from bar(map(task, items))
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            yield from bar(pool.map(task, items, chunksize=CHUNK))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _up_to_date(path: str, stamp: str) -> dict | None:
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        return content if content["info"]["fingerprint"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_json(path: str, content: dict) -> None:
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", default=None, help="default: $DETECTRON2_DATASETS/visdrone")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=list(visdrone.SPLITS),
        help="default: those whose folders are there",
    )
    parser.add_argument("--crops", action="store_true", help="make visdrone_train_crops as well")
    parser.add_argument("--jobs", type=whole(1), default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--force", action="store_true", help="make up-to-date files again")
    return parser.parse_args(argv)


def main(args) -> None:
    root = os.path.abspath(os.path.expanduser(args.root or visdrone.visdrone_root()))
    there = [s for s, d in visdrone.SPLITS.items() if os.path.isdir(os.path.join(root, d))]
    splits = args.splits or there
    if not splits:
        folders = ", ".join(visdrone.SPLITS.values())
        raise ConfigError(f"--root: {root} holds none of {folders}")
    if args.crops and "train" not in splits:
        raise ConfigError("--crops: it is made of the train split, which is not among --splits")
    for split in splits:
        print_report(split, convert(root, split, args.jobs, args.force)["info"])
    if args.crops:
        print_report(visdrone.CROPS, make_crops(root, args.jobs, args.force)["info"])
