"""Pictures by object size: what is counted, and where the ink is."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.kd.analysis.size_pictures import detections_by_size, size_histogram
from projects.kd.data import visdrone
from projects.kd.errors import ConfigError

NAME = "size_pictures"


@pytest.fixture
def data(tmp_path):
    """One image of 300x200: sizes 10, 31.9, 32, 96 and 100, a region, a crowd."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    boxes = [[0, 0, 10, 10], [20, 0, 30, 34], [60, 0, 32, 32], [0, 60, 96, 96], [120, 60, 100, 100]]
    rows = [[*box, 1, 1 + i % 2, 0, 0] for i, box in enumerate(boxes)]
    rows += [[240, 0, 50, 50, 0, 0, 0, 0], [100, 0, 10, 10, 0, 1, 0, 0]]
    record = visdrone.to_record(rows, "a.png", 300, 200)
    (tmp_path / "a.json").write_text(json.dumps(visdrone.to_coco([record], {})))
    visdrone.register_visdrone_data(NAME, str(tmp_path / "a.json"), str(tmp_path))
    yield boxes
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def results(path, *rows):
    keys = ("bbox", "category_id", "score")
    items = [{"image_id": 1, **dict(zip(keys, row, strict=True))} for row in rows]
    path.write_text(json.dumps(items))
    return str(path)


def test_histogram(data, tmp_path):
    shares = size_histogram(NAME, str(tmp_path / "new" / "h.png"))
    # 30x34 is 31.94, 32x32 is medium; the crowd does not count
    assert shares == pytest.approx({"small": 0.4, "medium": 0.2, "large": 0.4})
    assert np.array(Image.open(tmp_path / "new" / "h.png")).std() > 10


def test_detections_by_size(data, tmp_path):
    file = results(
        tmp_path / "r.json",
        (data[0], 1, 0.9),  # found
        ([3, 4, 10, 10], 1, 0.8),  # found already: false
        ([23, 3, 30, 34], 1, 0.9),  # of another class: false, and the object is missed
        ([60, 0, 32, 20], 1, 0.9),  # IoU 0.63, small by its own size: the object is medium
        (data[3], 2, 0.2),  # below the threshold: missed
        ([245, 5, 40, 40], 1, 0.9),  # in the region
        ([150, 180, 100, 99], 2, 0.7),  # false and large
    )
    counts = detections_by_size(NAME, file, str(tmp_path / "f.png"))
    assert counts == {"small": (1, 1, 2), "medium": (1, 0, 0), "large": (0, 2, 1)}
    pixels = np.array(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    columns = np.array_split(pixels[30:], 3, axis=1)
    shown = []
    for r, g, b in (np.moveaxis(column, 2, 0) for column in columns):
        red = (r > 110) & (g < 0.4 * r) & (b < 0.4 * r)
        orange = (r > 110) & (g > 0.55 * r) & (g < 0.85 * r) & (b < 0.3 * r)
        shown.append([((b > 110) & (r < 0.3 * b)).any(), red.any(), orange.any()])
    assert shown == [[True, True, True], [True, False, False], [False, True, True]]


def test_user_errors(data, tmp_path):
    (tmp_path / "odd.json").write_text("[1]")
    for file in ("odd.json", "missing.json"):
        with pytest.raises(ConfigError, match=f"--results: .*{file} is no COCO results file"):
            detections_by_size(NAME, str(tmp_path / file), str(tmp_path / "f.png"))
    with pytest.raises(ConfigError, match="--output: .* cannot be written"):
        size_histogram(NAME, str(tmp_path / "h.odd"))
