"""The built-in data: ground truth against independent oracles, and generation on disk."""

import json
import os
import threading

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from kd_processes import run_ranks
from matplotlib.path import Path
from PIL import Image

from projects.kd.data import scene, shapes
from projects.kd.errors import DataError

GOLDEN = {  # of make_scene((1, 0)), the first training image
    "categories": [1, 1, 3, 4, 6],
    "bbox": [0.0, 0.0, 114.21, 163.78],
    "mean": 117.0,
    "semantic": [36806, 17176, 0, 10064, 912, 0, 578],
}


def arranged(index):
    """Things and label map of a scene, drawn from the same random numbers as its picture."""
    rng = np.random.Generator(np.random.PCG64([7, index]))
    height, width = scene._SIZES[rng.integers(len(scene._SIZES))]
    return *scene._arrange(rng, height, width), height, width


def oracle_masks(things, height, width, margin=300, fine=2):
    """Full and visible masks by matplotlib's point-in-polygon test, on a canvas with a margin."""
    shape = ((height + 2 * margin) * fine, (width + 2 * margin) * fine)
    full = []
    for thing in things:
        outline = (thing.outline + margin) * fine
        left, top = np.floor(outline.min(0)).astype(int)
        right, bottom = np.ceil(outline.max(0)).astype(int)
        ys, xs = np.mgrid[top:bottom, left:right]
        inner = Path(outline).contains_points(np.stack([xs.ravel(), ys.ravel()], 1) + 0.5)
        full.append(np.zeros(shape, bool))
        full[-1][top:bottom, left:right] = inner.reshape(xs.shape)
    inside = np.zeros(shape, bool)
    inside[margin * fine : -margin * fine, margin * fine : -margin * fine] = True
    visible, hidden = [], np.zeros(shape, bool)
    for mask in reversed(full):
        visible.append(mask & inside & ~hidden)
        hidden |= mask
    crop = slice(margin * fine, -margin * fine)
    return full, [mask[crop, crop] for mask in reversed(visible)]


@pytest.mark.parametrize("index", range(4))
def test_boxes_masks_and_keypoints_follow_the_rule_of_visibility(index):
    things, _, height, width = arranged(index)
    found = scene.make_scene((7, index)).annotations
    full, visible = oracle_masks(things, height, width)
    labelled = [i for i, thing in enumerate(things) if thing.category >= 0]
    assert len(labelled) == len(found) > 0
    for i, annotation in zip(labelled, found, strict=True):
        thing = things[i]
        assert annotation["category_id"] == thing.category + 1
        share = visible[i].sum() / full[i].sum()
        assert share > 0.4 - 0.05, "an object that is hardly visible is annotated"
        low = np.maximum(thing.outline.min(0), 0)
        high = np.minimum(thing.outline.max(0), (width, height))
        assert annotation["bbox"] == pytest.approx([*low, *(high - low)], abs=0.011)
        polygons = [(2 * np.array(p)).tolist() for p in annotation["segmentation"]]
        rles = mask_util.frPyObjects(polygons, 2 * height, 2 * width)
        mask = mask_util.decode(mask_util.merge(rles)).astype(bool)
        union = (mask | visible[i]).sum()
        boundary = 4 * np.sqrt(visible[i].sum())  # a fine pixel all around
        assert (mask ^ visible[i]).sum() <= 0.03 * union + boundary
        assert annotation["area"] == pytest.approx(visible[i].sum() / 4, rel=0.03, abs=4)
        seen = np.array(annotation["keypoints"]).reshape(4, 3)
        assert annotation["num_keypoints"] == (seen[:, 2] > 0).sum()
        for (x, y), (kx, ky, flag) in zip(thing.keypoints, seen, strict=True):
            assert (flag == 0) == (not (0 <= x < width and 0 <= y < height))
            if flag:
                assert (kx, ky) == pytest.approx((x - 0.5, y - 0.5), abs=0.011)
                near = visible[i][max(int(2 * y) - 2, 0) :, max(int(2 * x) - 2, 0) :][:5, :5]
                assert near.any() if flag == 2 else not near.all()


@pytest.mark.parametrize("name", scene.CLASSES)
def test_every_class_is_its_own_mirror_image_with_left_and_right_swapped(name):
    outline, keypoints = scene._SHAPES[name]
    mirrored = outline * (-1, 1)
    nearest = np.abs(mirrored[:, None] - outline[None]).sum(-1).min(1)
    assert nearest.max() < 1e-6
    pairs = dict(shapes.KEYPOINT_FLIP_MAP)
    pairs |= {b: a for a, b in pairs.items()}
    swap = [scene.KEYPOINTS.index(pairs.get(k, k)) for k in scene.KEYPOINTS]
    np.testing.assert_allclose(keypoints * (-1, 1), keypoints[swap], atol=1e-9)
    assert Path(outline).contains_points(keypoints).all()
    grid = np.random.default_rng(0).uniform(-0.5, 0.5, (2000, 2))
    inside, upside_down = (Path(o).contains_points(grid) for o in (outline, outline * (1, -1)))
    assert (inside & upside_down).sum() < 0.9 * (inside | upside_down).sum()


def test_scenes_are_deterministic_and_match_golden_numbers():
    first, again, other = (scene.make_scene(seed) for seed in ((1, 0), (1, 0), (1, 1)))
    np.testing.assert_array_equal(first.image, again.image)
    assert first.annotations == again.annotations != other.annotations
    # a change here changes the data of every user: count up shapes.VERSION with it
    assert shapes.VERSION == 1
    assert [a["category_id"] for a in first.annotations] == GOLDEN["categories"]
    assert first.annotations[0]["bbox"] == pytest.approx(GOLDEN["bbox"], abs=0.05)
    assert first.image.mean() == pytest.approx(GOLDEN["mean"], abs=0.5)
    assert np.bincount(first.semantic.ravel(), minlength=7) == pytest.approx(
        GOLDEN["semantic"], abs=20
    )


def test_semantic_map_holds_the_class_of_each_visible_object():
    found = scene.make_scene((7, 1))
    height, width = found.semantic.shape
    covered = np.zeros((height, width), bool)
    for annotation in found.annotations:
        rles = mask_util.frPyObjects(annotation["segmentation"], height, width)
        mask = mask_util.decode(mask_util.merge(rles)).astype(bool)
        covered |= mask
        core = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1)
        core &= np.roll(mask, -1, 1)
        if core.sum() > 20:
            assert (found.semantic[core] == annotation["category_id"]).mean() > 0.95
    assert (found.semantic[~covered] == 0).mean() > 0.98


def test_size_bands_are_filled_and_images_are_ragged():
    scenes = [scene.make_scene((9, index)) for index in range(60)]
    areas = np.array([a["area"] for s in scenes for a in s.annotations])
    boxes = np.array([a["bbox"] for s in scenes for a in s.annotations])
    shares = [(areas < 32**2).mean(), ((areas >= 32**2) & (areas < 96**2)).mean()]
    assert min(*shares, 1 - sum(shares)) > 0.02
    assert boxes[:, 2:].max(1).min() < 1.3 * scene._OBJECT_SIDE[0] < 20
    assert {s.image.shape for s in scenes} == {(256, 256, 3), (256, 320, 3), (320, 256, 3)}
    counts = [len(s.annotations) for s in scenes]
    assert min(counts) >= 1 and max(counts) >= 7 and 4 < np.mean(counts) < 6.5
    classes = np.bincount([a["category_id"] for s in scenes for a in s.annotations])[1:]
    assert len(classes) == 6 and classes.min() > 0.5 * classes.max()


def test_contours_with_holes_become_polygons_without():
    mask = np.zeros((160, 240), bool)
    mask[20:140, 20:220] = True
    mask[48:80, 40:80] = False
    mask[60:120, 120:200] = False
    rles = mask_util.frPyObjects([p.ravel().tolist() for p in scene.trace(mask)], 160, 240)
    drawn = mask_util.decode(mask_util.merge(rles)).astype(bool)
    assert not drawn[50:78, 42:78].any() and not drawn[62:118, 122:198].any()
    assert (drawn ^ mask).sum() < 0.05 * mask.sum()


def test_generation_writes_complete_coco_data_once(tmp_path):
    folder = str(tmp_path / "shapes" / "val")
    left_over = tmp_path / "shapes" / ".val-killed"
    (left_over / "val").mkdir(parents=True)
    shapes.generate("val", folder, count=4)
    assert not left_over.exists()
    with open(os.path.join(folder, "instances.json")) as stream:
        content = json.load(stream)
    assert [image["id"] for image in content["images"]] == [1, 2, 3, 4]
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    expected = scene.make_scene((shapes._SEEDS["val"], 2))
    third = [a for a in content["annotations"] if a["image_id"] == 3]
    assert [a["bbox"] for a in third] == [a["bbox"] for a in expected.annotations]
    picture = np.array(Image.open(os.path.join(folder, "images", "000002.jpg")))[..., ::-1]
    assert np.abs(picture.astype(float) - expected.image).mean() < 6
    semantic = np.array(Image.open(os.path.join(folder, "semantic", "000002.png")))
    np.testing.assert_array_equal(semantic, expected.semantic)
    written = os.stat(os.path.join(folder, "instances.json")).st_mtime_ns
    shapes.generate("val", folder, count=9)
    assert os.stat(os.path.join(folder, "instances.json")).st_mtime_ns == written


def test_interrupted_generation_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def broken(seed):
        if seed[1] == 2:
            raise KeyboardInterrupt
        return scene.make_scene(seed)

    folder = str(tmp_path / "val")
    monkeypatch.setattr(shapes, "make_scene", broken)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate("val", folder, count=4)
    assert not os.path.exists(folder)
    monkeypatch.undo()
    shapes.generate("val", folder, count=2)
    assert len(os.listdir(os.path.join(folder, "images"))) == 2


def generate(rank, folder):
    shapes.generate("val", folder, 30)


def test_two_processes_do_not_collide(tmp_path):
    run_ranks(generate, str(tmp_path / "val"))
    assert len(os.listdir(tmp_path / "val" / "images")) == 30
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".val")]


def test_two_threads_make_the_data_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        shapes, "make_scene", lambda seed: calls.append(seed) or scene.make_scene(seed)
    )
    folder = str(tmp_path / "val")
    threads = [threading.Thread(target=shapes.generate, args=("val", folder, 5)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 5


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set DETECTRON2_DATASETS to a writable folder"):
        shapes.generate("val", str(tmp_path / "file" / "shapes" / "val"), count=1)


def test_default_and_configured_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    expected = os.path.join(str(tmp_path), "shapes", f"v{shapes.VERSION}", "train")
    assert shapes.split_folder("train") == expected
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    expected = os.path.join(str(tmp_path), "datasets", "shapes", f"v{shapes.VERSION}", "val")
    assert shapes.split_folder("val") == expected


def test_few_holds_the_first_pictures_of_train(tmp_path):
    for split, count in (("few", 2), ("train", 3), ("dev", 2)):
        shapes.generate(split, str(tmp_path / split), count)
    few, train = (
        json.loads((tmp_path / s / "instances.json").read_text()) for s in ("few", "train")
    )
    assert few["images"] == train["images"][:2]
    assert few["annotations"] == [row for row in train["annotations"] if row["image_id"] <= 2]
    for image in few["images"]:
        picture = (tmp_path / "few/images" / image["file_name"]).read_bytes()
        assert picture == (tmp_path / "train/images" / image["file_name"]).read_bytes()
        assert picture != (tmp_path / "dev/images" / image["file_name"]).read_bytes()


def test_flipping_keeps_left_left(tmp_path, monkeypatch):
    """Objects are tilted by less than 90 degrees, so "left" is left of "right", flipped or not."""
    monkeypatch.setitem(shapes.SPLITS, "val", 6)
    dicts = shapes._load("shapes_for_flipping", "val", str(tmp_path / "val"))
    MetadataCatalog.get("shapes_for_flipping").set(
        keypoint_names=scene.KEYPOINTS, keypoint_flip_map=shapes.KEYPOINT_FLIP_MAP
    )
    assert all(os.path.isfile(entry["sem_seg_file_name"]) for entry in dicts)
    cfg = get_cfg()
    cfg.MODEL.KEYPOINT_ON = cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = ("shapes_for_flipping",)
    compared = 0
    for probability in (0.0, 1.0):
        options = DatasetMapper.from_config(cfg, is_train=True)
        options["augmentations"] = [T.RandomFlip(prob=probability)]
        for entry in dicts:
            instances = DatasetMapper(**options)(entry)["instances"]
            for points in instances.gt_keypoints.tensor:
                left, right = points[1], points[2]
                if left[2] and right[2]:
                    assert left[0] < right[0]
                    compared += 1
    assert compared > 30


def test_registered_names_and_metadata():
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.thing_classes == scene.CLASSES and len(set(scene.CLASSES)) >= 5
    assert metadata.stuff_classes == ["background", *scene.CLASSES]
    assert metadata.evaluator_type == "coco" and metadata.ignore_label == 255
    named = {name for a, b, _ in metadata.keypoint_connection_rules for name in (a, b)}
    assert named == set(metadata.keypoint_names) == set(scene.KEYPOINTS)
    assert metadata.json_file.endswith(os.path.join("val", "instances.json"))
    shapes.register_shapes()  # twice is once
