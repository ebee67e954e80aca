"""Run the deployed student on images, folders of images, or a video, and draw what it finds.

    kd-demo --config-file CONFIG --input a.jpg photos/ --output out/ \\
        MODEL.WEIGHTS output/model_final.pth
    kd-demo --config-file CONFIG --video in.mp4 --output out.mp4 MODEL.WEIGHTS ...

CONFIG may be the config of a distillation: no teacher and no imitation head is built.
MODEL.WEIGHTS may be a file of kd-export; TEST.QUICK has options that make the student itself
faster. Boxes, masks, keypoints and panoptic segments are drawn as far as the model predicts them;
detections.json beside the pictures holds boxes XYXY in pixels of the image, scores and classes. An
image that cannot be used is named and skipped; the exit status is then 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import cv2
import detectron2.data.transforms as T
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from .. import ConfigError, check_config, load_config
from ..arguments import Parser, number
from ..data.images import IMAGE_SUFFIXES, in_format, read_image
from ..data.register import register_configured
from ..deploy.use import used_detector
from ..errors import DataError, exit_on_user_error
from ..evaluation.tiles import TiledDetector
from ..files import writable_folder


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images or folders of images")
    source.add_argument("--video", metavar="FILE", help="a video file")
    parser.add_argument("--output", required=True, help="a folder, or with --video a file (.mp4)")
    parser.add_argument("--confidence-threshold", type=number(0, 1), default=0.5, metavar="SCORE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


class Predictor:
    """The plain student with its test-time resizing.

    Args:
        cfg: its config; MODEL.WEIGHTS names a checkpoint of this project or of detectron2, or a
            file of kd-export.
        threshold: detections of a lower score are dropped.
    """

    def __init__(self, cfg, threshold: float):
        self.model = used_detector(cfg)
        if cfg.TEST.TILES.ENABLED:
            self.model = TiledDetector.from_config(cfg, self.model)
        self.resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self.format = cfg.INPUT.FORMAT
        self.white = cfg.INPUT.WHITE
        self.threshold = threshold
        names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
        self.metadata = MetadataCatalog.get(names[0] if names else "__unnamed")

    @torch.no_grad()
    def __call__(self, image) -> dict:
        """detectron2's outputs, on the CPU, for an (H, W, 3) uint8 image in BGR order.

        Raises:
            DataError: the image is so thin that resizing leaves nothing of it.
        """
        height, width = image.shape[:2]
        own = image
        if self.format != "BGR":
            own = in_format(Image.fromarray(image[:, :, ::-1]), self.format)
        try:
            resized = self.resize.get_transform(own).apply_image(own)
        except ValueError as error:
            raise DataError(
                f"image of {width}x{height} pixels cannot be resized by INPUT.MIN_SIZE_TEST and "
                f"MAX_SIZE_TEST: {error}"
            ) from error
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1).copy())
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        if "instances" in output:
            found = output["instances"].to("cpu")
            output["instances"] = found[found.scores >= self.threshold]
        return output

    def draw(self, image, output: dict):
        """The image (BGR) with what was found; the most that the model predicts."""
        canvas = Visualizer(image[:, :, ::-1], self.metadata)
        if "panoptic_seg" in output:
            segments, info = output["panoptic_seg"]
            drawn = canvas.draw_panoptic_seg_predictions(segments.cpu(), info)
        elif "instances" in output:
            drawn = canvas.draw_instance_predictions(output["instances"])
        else:
            drawn = canvas.draw_sem_seg(output["sem_seg"].argmax(0).cpu())
        return drawn.get_image()[:, :, ::-1]


def detections(output: dict, class_names) -> list[dict]:
    """JSON-ready boxes XYXY in pixels, scores and classes."""
    if "instances" not in output:
        return []
    found = output["instances"]
    rows = zip(
        found.pred_boxes.tensor.tolist(),
        found.scores.tolist(),
        found.pred_classes.tolist(),
        strict=True,
    )
    return [
        {
            "box": [round(x, 2) for x in box],
            "score": round(score, 4),
            "class": class_names[kind] if kind < len(class_names) else kind,
        }
        for box, score, kind in rows
    ]


def image_files(paths: list[str], key: str = "--input") -> list[str]:
    """Images named, and those in the folders named, each folder sorted.

    Args:
        paths: files and folders.
        key: flag that names them, for messages.

    Raises:
        DataError: a path that does not exist, or a folder without images.
    """
    files = []
    for path in paths:
        if os.path.isfile(path):
            files.append(path)
            continue
        if not os.path.isdir(path):
            raise DataError(f"{key}: no such file or folder '{path}'")
        found = sorted(x for x in os.listdir(path) if x.lower().endswith(IMAGE_SUFFIXES))
        if not found:
            raise DataError(f"{key}: no image ({', '.join(IMAGE_SUFFIXES)}) in folder '{path}'")
        files += [os.path.join(path, name) for name in found]
    return files


def run_on_images(predictor: Predictor, files: list[str], folder: str) -> None:
    """A picture for each image, numbered, and detections.json, also of what an end leaves undone.

    Raises:
        DataError: images that could not be used, after all others are done.
    """
    writable_folder(folder, "--output")
    report, bad = {}, []
    try:
        for i, path in enumerate(files):
            try:
                report[path] = _run_on_image(predictor, path, os.path.join(folder, f"{i:04d}"))
            except DataError as error:
                bad.append(str(error) if path in str(error) else f"{path}: {error}")
                print(f"{bad[-1]}; passed over", file=sys.stderr, flush=True)
            else:
                print(f"{path}: {len(report[path])} detections", flush=True)
    finally:
        _write(report, os.path.join(folder, "detections.json"))
    if bad:
        raise DataError(f"--input: {len(bad)} of {len(files)} images were passed over: {bad[0]}")


def _run_on_image(predictor: Predictor, path: str, start: str) -> list[dict]:
    """Detections of one image; its picture's name begins with ``start``."""
    image = read_image(path, "BGR", predictor.white)
    output = predictor(image)
    stem = os.path.splitext(os.path.basename(path))[0]
    picture = f"{start}_{stem}.jpg"
    try:
        written = cv2.imwrite(picture, predictor.draw(image, output))
    except cv2.error:  # a JPEG has at most 65500 pixels a side
        written = False
    if not written:
        raise DataError(f"{path}: its picture cannot be written to {picture}")
    return detections(output, predictor.metadata.get("thing_classes", ()))


def _write(report: dict, path: str) -> None:
    try:
        with open(path + ".part", "w") as file:
            json.dump(report, file, indent=1)
        os.replace(path + ".part", path)
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written: {error.strerror}") from error


def run_on_video(predictor: Predictor, path: str, output: str) -> int:
    """Frame by frame; returns the number of frames.

    Raises:
        DataError: the video cannot be read, or the output not be written.
    """
    video = cv2.VideoCapture(path)
    size = tuple(int(video.get(x)) for x in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not video.isOpened() or not all(size):
        raise DataError(f"--video: '{path}' cannot be read as a video")
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    writer = cv2.VideoWriter(output, cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise DataError(f"--output: '{output}' cannot be written as a video; name an .mp4 file")
    count = 0
    while True:
        there, frame = video.read()
        if not there:
            break
        writer.write(predictor.draw(frame, predictor(frame)))
        count += 1
    writer.release()
    print(f"{output}: {count} frames")
    return count


def main(args) -> None:
    """Build the student and run it."""
    cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg, training=False)
    predictor = Predictor(cfg, args.confidence_threshold)
    if args.video:
        run_on_video(predictor, args.video, args.output)
    else:
        run_on_images(predictor, image_files(args.input), args.output)


def run() -> None:
    """The command."""
    with exit_on_user_error():
        main(parse_arguments())
