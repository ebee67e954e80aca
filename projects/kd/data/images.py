"""Image files: what a header says, and pixels read by one rule for training, evaluation and tools.

- The first frame counts. An EXIF (or TIFF) orientation is applied, once.
- Images of more than 8 bits a channel are scaled to 0..255 by INPUT.WHITE, and refused without it:
  Pillow would cut them off at 255, or take the upper 8 bits whatever they hold.
- Text and colour profiles in a PNG are left out where they are too large for Pillow.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..config import register_config
from ..errors import DataError

# of the files in a folder that are taken for images
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ORIENTATION = 274  # the EXIF tag; 5 to 8 exchange width and height
_SIDEWAYS = (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Pillow reads these, but cannot make RGB of them
_NO_COLOURS = ("LAB",)

T = TypeVar("T")


@register_config
def add_image_config(cfg: CfgNode) -> None:
    """Add INPUT.WHITE."""
    # The value that is white in images of more than 8 bits a channel (65535 for 16 bits, 4095 where
    # 12 of them are used, 1.0 for most float images): value / WHITE * 255, rounded, cut off at 0
    # and 255. 0.0 = such images are refused, since a file does not say which one it is.
    cfg.INPUT.WHITE = 0.0


@dataclass(frozen=True)
class ImageHeader:
    """Width and height in pixels as :func:`read_image` gives them; Pillow's mode; more than 8 bits
    a channel or not; the EXIF orientation, 1 to 8.
    """

    width: int
    height: int
    mode: str
    deep: bool
    orientation: int


def image_header(path: str) -> ImageHeader:
    """Read the header of an image, and all of it only where its end looks cut off.

    Raises:
        DataError: what cannot be read as an image.
    """

    def look(image: Image.Image) -> ImageHeader:
        deep = _is_deep(image)
        if _looks_cut_off(image):
            image.load()
        # not a PNG's own getexif, which decodes the pixels
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
        width, height = image.size
        if orientation in _SIDEWAYS and image.format != "TIFF":  # Pillow has turned that one
            width, height = height, width
        return ImageHeader(width, height, image.mode, deep, orientation)

    return _read(path, look)


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image in pixels as it is read; see :func:`image_header`."""
    header = image_header(path)
    return header.width, header.height


def read_image(path: str, image_format: str, white: float = 0.0) -> np.ndarray:
    """The pixels of an image, as detectron2's function of this name gives them.

    Args:
        path: of the file.
        image_format: as INPUT.FORMAT: "BGR", "RGB", "L" or "YUV-BT.601".
        white: see INPUT.WHITE.

    Returns:
        (H, W, C) uint8 in 0..255; float32 for "YUV-BT.601".

    Raises:
        DataError: what cannot be read, or has more than 8 bits a channel while ``white`` is 0.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        deep = _is_deep(image)
        if problem := mode_problem(image.mode, deep, white):
            raise DataError(f"{path}: {problem}")
        image.load()  # before the orientation is asked for: Pillow applies that of a TIFF itself
        if deep:
            orientation = image.getexif().get(_ORIENTATION, 1)
            image = Image.fromarray(_eight_bits(_deep_values(path, image), white))
            image.getexif()[_ORIENTATION] = orientation
        return in_format(_apply_exif_orientation(image), image_format)

    return _read(path, pixels)


def in_format(image: Image.Image, image_format: str) -> np.ndarray:
    """The pixels of an opened image; see :func:`read_image`."""
    pixels = convert_PIL_to_numpy(image, image_format)
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def read_labels(path: str) -> np.ndarray:
    """The values of a label map, (H, W) uint8; of one with a palette the indices.

    Raises:
        DataError: unreadable, or not one byte a pixel.
    """

    def labels(image: Image.Image) -> np.ndarray:
        if image.mode not in ("L", "P"):
            raise DataError(
                f"{path}: label map has mode {image.mode}, it needs one byte a pixel (mode L, or P "
                "with a palette)"
            )
        return np.array(image)

    return _read(path, labels)


def mode_problem(mode: str, deep: bool, white: float) -> str:
    """Why an image of this mode is not read with INPUT.WHITE ``white``, or ""."""
    if deep and white <= 0:
        return (
            f"image has mode {mode} with more than 8 bits a channel: set INPUT.WHITE to the value "
            "that is white (65535, 4095 where 12 bits are used, 1.0 for float), or convert it"
        )
    if mode in _NO_COLOURS:
        return f"image has mode {mode}, which does not become RGB: convert it"
    return ""


def size_problem(header: ImageHeader, width: float, height: float) -> str:
    """How an image differs from the (width, height) that annotations give it, or ""."""
    if (header.width, header.height) == (width, height):
        return ""
    return (
        f"image has {header.width}x{header.height} pixels, its annotations say {width}x{height}"
        f"{turned_note(header)}"
    )


def turned_note(header: ImageHeader) -> str:
    """What to say of an image of unexpected size that its EXIF orientation turns, or ""."""
    if header.orientation not in _SIDEWAYS:
        return ""
    return (
        f"; stored are {header.height}x{header.width}, its EXIF orientation {header.orientation} "
        "turns it: remove the orientation if the annotations were made on the image as stored"
    )


def _read(path: str, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of the opened image; whatever goes wrong is a DataError naming the file.

    A PNG that fails is tried again without its text.
    """
    try:
        with PathManager.open(path, "rb") if "://" in path else open(path, "rb") as stream:
            try:
                with Image.open(stream) as image:
                    return use(image)
            except DataError:
                raise
            except Exception:
                plain = _without_text(stream)
                if plain is None:
                    raise
                with Image.open(plain) as image:
                    return use(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: image cannot be read: it is in no format of Pillow's") from error
    except OSError as error:
        reason = error.strerror if error.errno else error
        raise DataError(f"{path}: image cannot be read: {reason}") from error
    except Exception as error:  # Pillow's readers raise what their parsing runs into
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: image cannot be read: {reason}") from error


def _without_text(stream) -> io.BytesIO | None:
    """A PNG file without the chunks of _PNG_TEXT; None for other files and those without any."""
    stream.seek(0)
    if stream.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        return None
    kept, dropped = [_PNG_SIGNATURE], False
    while len(head := stream.read(8)) == 8:
        body = stream.read(int.from_bytes(head[:4], "big") + 4)  # and its checksum
        if head[4:] in _PNG_TEXT:
            dropped = True
        else:
            kept += [head, body]
    return io.BytesIO(b"".join(kept)) if dropped else None


def _looks_cut_off(image: Image.Image) -> bool:
    """Whether a JPEG or PNG does not end as one; what follows its end is legal, but rare."""
    end = {"JPEG": b"\xff\xd9", "PNG": _PNG_END}.get(image.format)
    if end is None:
        return False
    place = image.fp.tell()
    image.fp.seek(-len(end), os.SEEK_END)
    found = image.fp.read(len(end))
    image.fp.seek(place)
    return found != end


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel, for an image whose pixels are not loaded yet."""
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    arguments = image.tile[0][3] if image.tile else ()
    layout = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    name, _, bits = str(layout).partition(";")
    return bits.startswith("16") and name != "BGR"  # BGR;16 has 5 or 6 bits a channel


def _deep_values(path: str, image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, 3) RGB as stored; Pillow itself keeps only 8 bits of colours."""
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image)
    with open(PathManager.get_local_path(path), "rb") as stream:
        values = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype == np.uint8 or image.mode not in ("RGB", "RGBA"):
        raise DataError(
            f"{path}: image cannot be read: mode {image.mode} with more than 8 bits a channel"
        )
    return values if values.ndim == 2 else values[..., 2::-1]


def _eight_bits(values: np.ndarray, white: float) -> np.ndarray:
    scaled = np.nan_to_num(values.astype(np.float64) * (255 / white), posinf=255, neginf=0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
