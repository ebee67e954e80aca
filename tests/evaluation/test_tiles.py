"""Tiled inference against the same detector on the whole image."""

import json

import kd_models
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from scipy import ndimage

from projects.kd import ConfigError, check_config
from projects.kd.data import visdrone
from projects.kd.evaluation import evaluate
from projects.kd.evaluation.tiles import TiledDetector, tile_starts


class Blobs(torch.nn.Module):
    """Finds connected bright spots: box, brightness as the score, class 1 if wider than high."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        outputs = []
        for entry in batch:
            image = entry["image"][0].numpy()
            self.seen.append(image.shape)
            labels, _ = ndimage.label(image > 0)
            slices = ndimage.find_objects(labels)
            boxes = [[x.start, y.start, x.stop, y.stop] for y, x in slices]
            found = Instances((entry["height"], entry["width"]))
            found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
            found.pred_boxes.scale(
                entry["width"] / image.shape[1], entry["height"] / image.shape[0]
            )
            found.scores = torch.tensor([image[s].max() / 255.0 for s in slices]).float()
            found.pred_classes = torch.tensor(
                [int(b[2] - b[0] > b[3] - b[1]) for b in boxes], dtype=torch.long
            )
            outputs.append({"instances": found})
        return outputs


def tiled(model, size=40, overlap=16, whole=False, limit=100, thresh=0.5):
    return TiledDetector(
        model,
        size=size,
        overlap=overlap,
        nms_thresh=thresh,
        whole_image=whole,
        max_detections=limit,
    )


def picture(boxes, size=(90, 130)):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for number, (x, y, w, h) in enumerate(boxes):
        image[:, y : y + h, x : x + w] = 250 - 3 * number
    return {"image": image, "height": size[0], "width": size[1]}


def as_set(instances):
    boxes = instances.pred_boxes.tensor.tolist()
    rest = zip(instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
    return {(*box, round(s, 5), c) for box, (s, c) in zip(boxes, rest, strict=True)}


@pytest.mark.parametrize("length", [1, 39, 40, 41, 63, 64, 65, 90, 130, 517])
@pytest.mark.parametrize(("size", "overlap"), [(40, 0), (40, 16), (40, 39)])
def test_tiles_cover_the_side_with_the_overlap(length, size, overlap):
    starts = tile_starts(length, size, overlap)
    ends = [min(start + size, length) for start in starts]
    assert starts[0] == 0 and ends[-1] == length
    assert all(b <= a_end - overlap for b, a_end in zip(starts[1:], ends[:-1], strict=True))
    assert all(end - start == min(size, length) for start, end in zip(starts, ends, strict=True))
    if length > size:
        assert len(starts) == 1 + int(np.ceil((length - size) / (size - overlap)))


def test_an_object_inside_of_a_tile_is_found_as_without_tiles():
    entry = picture([[5, 5, 10, 8]])  # in the first tile only
    model = Blobs()
    whole = model([entry])[0]["instances"]
    found = tiled(model)([entry])[0]["instances"]
    assert torch.equal(found.pred_boxes.tensor, whole.pred_boxes.tensor)
    assert torch.equal(found.scores, whole.scores)
    assert torch.equal(found.pred_classes, whole.pred_classes)
    assert found.image_size == (90, 130)


def test_all_objects_smaller_than_the_overlap_are_found_once_and_whole():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cells = [(x, y) for x in range(0, 118, 14) for y in range(0, 78, 14)]
        boxes = []
        for x, y in cells:
            if rng.random() < 0.5:
                w, h = rng.integers(3, 13, 2)
                boxes.append([x + int(rng.integers(0, 14 - w)), y, int(w), int(h)])
        entry = picture(boxes)
        model = Blobs()
        found = tiled(model)([entry])[0]["instances"]
        assert as_set(found) == as_set(model([entry])[0]["instances"])
        assert (found.scores.diff() <= 0).all()


def test_a_large_object_needs_the_whole_image():
    entry = picture([[2, 2, 120, 30], [60, 60, 8, 8]])
    model = Blobs()
    expected = as_set(model([entry])[0]["instances"])
    assert expected <= as_set(tiled(model, whole=True)([entry])[0]["instances"])
    assert not expected <= as_set(tiled(model)([entry])[0]["instances"])


def test_boxes_come_in_pixels_of_the_stored_image():
    boxes = [[5, 5, 10, 8], [70, 50, 12, 6]]
    entry = picture(boxes) | {"height": 45, "width": 65}
    model = Blobs()
    assert as_set(tiled(model)([entry])[0]["instances"]) == as_set(model([entry])[0]["instances"])
    assert tiled(model)([entry])[0]["instances"].image_size == (45, 65)


def test_an_image_of_one_tile_goes_through_as_it_is():
    entry = picture([[5, 5, 10, 8]], size=(30, 40)) | {"height": 60, "width": 80, "image_id": 3}
    model = Blobs()
    found = tiled(model)([entry])[0]["instances"]
    assert as_set(found) == as_set(model([entry])[0]["instances"])
    assert model.seen == [(30, 40)] * 2


def test_an_empty_image_and_the_limit():
    model = Blobs()
    found = tiled(model)([picture([])])[0]["instances"]
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)
    many = picture([[x, 5, 6, 6] for x in range(0, 120, 10)])
    best = tiled(model, limit=3)([many])[0]["instances"]
    assert best.scores.tolist() == pytest.approx([250 / 255, 247 / 255, 244 / 255])


def test_suppression_is_within_a_class():
    class Two(torch.nn.Module):
        def forward(self, batch):
            found = Instances(tuple(batch[0]["image"].shape[-2:]))
            found.pred_boxes = Boxes(torch.tensor([[5.0, 5, 25, 25], [5, 5, 25, 24]] * 2))
            found.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
            found.pred_classes = torch.tensor([0, 0, 1, 1])
            return [{"instances": found}]

    found = tiled(Two(), size=40, overlap=0)([picture([], size=(40, 80))])[0]["instances"]
    # the same boxes in the tile beside it lie elsewhere
    assert found.scores.tolist() == pytest.approx([0.9, 0.9, 0.7, 0.7])
    assert sorted(found.pred_boxes.tensor[:, 0].tolist()) == [5, 5, 45, 45]


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_a_detector_in_a_tile_of_its_own(arch):
    """Each tile gives what the detector finds in the tile as an image of its own."""
    cfg = kd_models.tiny_cfg(arch)
    model = kd_models.build(cfg).eval()
    image = torch.randint(0, 256, (3, 64, 128), generator=torch.Generator().manual_seed(0))
    entry = {"image": image.to(torch.uint8), "height": 64, "width": 128}
    found = tiled(model, size=64, overlap=0, thresh=1.0, limit=10**6)([entry])[0]["instances"]
    parts = set()
    for left in (0, 64):
        tile = entry["image"][:, :, left : left + 64]
        with torch.no_grad():
            own = model([{"image": tile, "height": 64, "width": 64}])[0]["instances"]
        own.pred_boxes.tensor[:, ::2] += left
        parts |= as_set(own)
    assert len(parts) > 10 and as_set(found) == parts


def test_evaluation_uses_the_config(tmp_path):
    records = []
    boxes = [[5, 5, 12, 8], [70, 60, 12, 6]]
    Image.fromarray(picture(boxes)["image"].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    rows = [[*box, 1, 2, 0, 0] for box in boxes]
    records.append(visdrone.to_record(rows, "a.png", 130, 90))
    (tmp_path / "a.json").write_text(json.dumps(visdrone.to_coco(records, {})))
    name = "tiles_visdrone"
    visdrone.register_visdrone_data(name, str(tmp_path / "a.json"), str(tmp_path))
    cfg = kd_models.tiny_cfg(
        INPUT__MIN_SIZE_TEST=0,
        DATASETS__TEST=(name,),
        OUTPUT_DIR=str(tmp_path),
        TEST__TILES__ENABLED=True,
        TEST__TILES__SIZE=40,
        TEST__TILES__OVERLAP=16,
        TEST__TILES__WHOLE_IMAGE=False,
    )
    model = Blobs()
    results = evaluate(cfg, model.eval())
    assert results["visdrone"]["AP"] == pytest.approx(100)
    assert not model.training
    assert set(model.seen) == {(40, 40)} and len(model.seen) == 4 * 5
    model.seen.clear()
    cfg.TEST.TILES.WHOLE_IMAGE = True
    evaluate(cfg, model)
    assert len(model.seen) == 4 * 5 + 1 and model.seen[-1] == (90, 130)
    model.seen.clear()
    cfg.TEST.TILES.ENABLED = False
    assert evaluate(cfg, model)["visdrone"]["AP"] == pytest.approx(100)
    assert model.seen == [(90, 130)]
    cfg.TEST.TILES.ENABLED = True
    with pytest.raises(ConfigError, match="TEST.TILES.ENABLED: this evaluation has a mapper"):
        evaluate(cfg, model, mapper=lambda entry: entry)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"TEST__TILES__OVERLAP": 800}, "TEST.TILES.OVERLAP is 800, .* SIZE, 800"),
        ({"TEST__TILES__OVERLAP": -1}, "TEST.TILES.OVERLAP is -1"),
        (
            {"TEST__TILES__SIZE": 0, "TEST__TILES__OVERLAP": 0},
            "TEST.TILES.SIZE is 0, it must be",
        ),
        ({"TEST__TILES__NMS_THRESH": 0.0}, "TEST.TILES.NMS_THRESH is 0.0"),
        ({"MODEL__MASK_ON": True}, "TEST.TILES.ENABLED: .* set MODEL.MASK_ON to False"),
        ({"TEST__AUG__ENABLED": True}, "TEST.TILES.ENABLED: .* set TEST.AUG.ENABLED to False"),
    ],
)
def test_user_errors(options, message):
    cfg = kd_models.tiny_cfg(
        "GeneralizedRCNN",
        DATASETS__TEST=(),
        TEST__TILES__ENABLED=True,
        **options,
    )
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, training=False)
