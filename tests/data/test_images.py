"""Reading of image files: depths, orientation, text in PNG, files that are cut off."""

import io
import random
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as stock_read_image
from PIL import Image, PngImagePlugin

from projects.kd.data.images import (
    image_header,
    image_size,
    read_image,
    read_labels,
    size_problem,
)
from projects.kd.errors import DataError

FORMATS = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP", "gif": "GIF"}
MODES = {
    "jpg": ("RGB", "L", "CMYK"),
    "png": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "tif": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "P", "1"),
    "gif": ("L", "P"),
}

TURNED = {  # EXIF orientation to what shows the stored pixels upright
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
}


def random_image(path, suffix, mode, orientation, rng, long_text=""):
    size = rng.randint(1, 60), rng.randint(1, 60)
    pixels = np.random.RandomState(rng.randint(0, 9999)).randint(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    more = {"lossless": True} if suffix == "webp" else {}
    if orientation != 1:
        exif = Image.Exif()
        exif[274] = orientation
        more["exif"] = exif
    if long_text:
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_text("Comment", long_text, zip=True)
    image.save(path, FORMATS[suffix], **more)
    return image


@pytest.mark.parametrize("seed", range(60))
def test_header_and_pixels_agree_for_random_legal_images(tmp_path, seed):
    rng = random.Random(seed)
    suffix = rng.choice(sorted(FORMATS))
    path = str(tmp_path / f"image.{suffix}")
    orientation = 1 if suffix in ("bmp", "gif") else rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8])
    source = random_image(path, suffix, rng.choice(MODES[suffix]), orientation, rng)
    header = image_header(path)
    for image_format in ("BGR", "RGB", "L"):
        pixels = read_image(path, image_format)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (header.height, header.width, 1 if image_format == "L" else 3)
        with Image.open(path) as image:
            image = source if suffix == "tif" else image  # Pillow turns a TIFF, sometimes twice
            mode = image_format.replace("BGR", "RGB")
            stored = np.asarray(image.convert(mode)).reshape(*source.size[::-1], -1)
        expected = TURNED[orientation](stored)
        assert np.array_equal(pixels[..., ::-1] if image_format == "BGR" else pixels, expected)
        if suffix != "tif" or orientation == 1:  # detectron2 turns a TIFF once more
            assert np.array_equal(pixels, stock_read_image(path, image_format))
    assert not header.deep and image_size(path) == (header.width, header.height)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow, of damaged tags
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_one_line(tmp_path, seed):
    rng = random.Random(seed)
    suffix = rng.choice(sorted(FORMATS))
    path = tmp_path / f"image.{suffix}"
    orientation = 1 if suffix in ("bmp", "gif") else 6
    text = "x" * 2_000_000 * (suffix == "png")
    random_image(path, suffix, rng.choice(MODES[suffix]), orientation, rng, text)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    path.write_bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.5 else data)
    for read in (image_header, lambda p: read_image(p, "BGR"), read_labels):
        try:
            read(str(path))
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("behind", [False, True])
def test_large_text_in_a_png_changes_nothing(tmp_path, monkeypatch, kind, behind):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2_000_000)  # for tEXt
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, "PNG")
    content = b"x" * 3_000_000
    body = {
        b"tEXt": b"Comment\0" + content,
        b"zTXt": b"Comment\0\0" + zlib.compress(content, 1),
        b"iTXt": b"Comment\0\1\0\0\0" + zlib.compress(content, 1),
        b"iCCP": b"profile\0\0" + zlib.compress(content, 1),
    }[kind]
    data = plain.getvalue()
    place = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    path = tmp_path / "text.png"
    path.write_bytes(data[:place] + chunk(kind, body) + data[place:])
    assert image_size(str(path)) == (30, 20)
    assert np.array_equal(read_image(str(path), "RGB"), pixels)


@pytest.mark.parametrize(
    ("name", "white"),
    [("grey.png", 65535), ("grey.png", 4095), ("rgb.png", 4095), ("rgb.tif", 1023)],
)
def test_sixteen_bits_are_scaled_by_white_and_refused_without(tmp_path, name, white):
    path = str(tmp_path / name)
    shape = (20, 30, 3) if name.startswith("rgb") else (20, 30)
    values = np.random.RandomState(0).randint(0, 65536, shape).astype(np.uint16)
    assert cv2.imwrite(path, values)
    header = image_header(path)
    assert header.deep and (header.width, header.height) == (30, 20)
    with pytest.raises(DataError, match=f"{name}: image has mode .*set INPUT.WHITE"):
        read_image(path, "BGR")
    expected = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    expected = expected if values.ndim == 3 else np.repeat(expected[..., None], 3, 2)
    assert np.array_equal(read_image(path, "BGR", white), expected)


def test_float_and_32_bit_images(tmp_path):
    values = np.linspace(-0.5, 1.5, 600, dtype=np.float32).reshape(20, 30)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="mode F .*INPUT.WHITE"):
        read_image(str(tmp_path / "f.tif"), "L")
    found = read_image(str(tmp_path / "f.tif"), "L", 1.0)[..., 0]
    expected = np.clip(np.rint(np.nan_to_num(values, posinf=9) * 255), 0, 255)
    assert np.array_equal(found, expected) and found[0, 1] == 255
    Image.fromarray((np.arange(600, dtype=np.int32) - 50).reshape(20, 30)).save(tmp_path / "i.tif")
    found = read_image(str(tmp_path / "i.tif"), "RGB", 255)
    assert found[0, 0].tolist() == [0, 0, 0] and found[-1, -1].tolist() == [255] * 3
    assert found[2, 0].tolist() == [10] * 3
    exif = Image.Exif()
    exif[274] = 6
    wide = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    assert image_size(str(tmp_path / "turned.png")) == (20, 30)
    turned = read_image(str(tmp_path / "turned.png"), "L", 255)[..., 0]
    assert np.array_equal(turned, np.clip(np.rot90(wide, -1), 0, 255))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_file_that_is_cut_off_is_found_by_its_header(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 7)  # what follows the end does not matter
    assert image_size(str(path)) == (64, 64)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="image cannot be read: .*truncated"):
        image_header(str(path))


def test_what_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").mkdir()
    for name, reason in (
        ("a.jpg", "in no format"),
        ("b.jpg", "Is a directory"),
        ("none.jpg", "No such file"),
    ):
        with pytest.raises(DataError, match=f"{name}: image cannot be read: .*{reason}"):
            image_header(str(tmp_path / name))
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tif")
    with pytest.raises(DataError, match="lab.tif: image has mode LAB"):
        read_image(str(tmp_path / "lab.tif"), "BGR")


def test_the_size_problem_names_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (160, 120)).save(tmp_path / "turned.jpg", exif=exif)
    header = image_header(str(tmp_path / "turned.jpg"))
    assert size_problem(header, 120, 160) == ""
    line = size_problem(header, 160, 120)
    assert "image has 120x160 pixels, its annotations say 160x120" in line
    assert "stored are 160x120, its EXIF orientation 6 turns it" in line
    Image.new("RGB", (160, 120)).save(tmp_path / "plain.jpg")
    line = size_problem(image_header(str(tmp_path / "plain.jpg")), 160, 121)
    assert "EXIF" not in line and "160x121" in line


def test_label_maps_keep_their_indices(tmp_path):
    values = np.random.RandomState(0).randint(0, 5, (12, 9)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "l.png")
    palette = Image.fromarray(values).convert("P")
    palette.putpalette(np.random.RandomState(1).randint(0, 256, 768).astype(np.uint8).tobytes())
    palette.putdata(values.ravel().tolist())
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_labels(str(tmp_path / "l.png")), values)
    assert np.array_equal(read_labels(str(tmp_path / "p.png")), values)
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match="rgb.png: label map has mode RGB"):
        read_labels(str(tmp_path / "rgb.png"))
