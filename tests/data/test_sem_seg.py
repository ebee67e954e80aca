"""Data sets with label maps: registration, mapping, evaluation, and files that do not fit."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from segmentation import segmentor_cfg

from projects.kd import ConfigError, DataError, check_config
from projects.kd.data import sem_seg
from projects.kd.data.loader import build_train_loader
from projects.kd.data.mapper import build_train_mapper
from projects.kd.data.register import register_configured
from projects.kd.evaluation import build_evaluator

CLASSES = ["sky", "road", "car"]


@pytest.fixture
def folders(tmp_path):
    """Four images 48x32 with label maps of three classes, two of them in a subfolder."""
    generator = np.random.default_rng(0)
    for i in range(4):
        name = f"city/{i}" if i % 2 else f"{i}"
        for root, suffix in (("images", ".jpg"), ("labels", ".png")):
            path = tmp_path / root / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if root == "images":
                pixels = generator.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            else:
                pixels = np.full((32, 48), 255, np.uint8)
                pixels[:16] = i % 3
            cv2.imwrite(str(path), pixels)
    return tmp_path


@pytest.fixture
def name(folders):
    yield "labels_toy"
    for registered in [key for key in sem_seg._configured if key.startswith("labels_toy")]:
        DatasetCatalog.remove(registered)
        MetadataCatalog.remove(registered)
        del sem_seg._configured[registered]


def toy_cfg(folders, name, **overrides):
    entry = [name, str(folders / "images"), str(folders / "labels"), CLASSES]
    values = {
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 3,
        "DATASETS__TRAIN": (name,),
        "DATASETS__TEST": (name,),
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "INPUT__MAX_SIZE_TRAIN": 96,
        "SEED": 1,
    }
    cfg = segmentor_cfg(**{**values, **overrides})
    cfg.KD.SEM_SEG_DATASETS = [entry]
    return cfg


def test_a_data_set_of_folders(folders, name):
    cfg = toy_cfg(folders, name)
    register_configured(cfg)
    register_configured(cfg)  # again changes nothing
    dicts = DatasetCatalog.get(name)
    assert [d["image_id"] for d in dicts] == ["0.jpg", "2.jpg", "city/1.jpg", "city/3.jpg"]
    assert all((d["height"], d["width"]) == (32, 48) for d in dicts)
    assert MetadataCatalog.get(name).stuff_classes == CLASSES
    check_config(cfg)
    batch = next(iter(build_train_loader(cfg)))
    for item in batch:
        assert item["image"].shape == (3, 64, 96) and item["sem_seg"].shape == (64, 96)
        assert set(item["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}


def test_classes_are_checked_against_the_data_set(folders, name):
    cfg = toy_cfg(folders, name, MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    register_configured(cfg)
    with pytest.raises(ConfigError, match="NUM_CLASSES is 19, but .* has 3 classes"):
        check_config(cfg)


@pytest.mark.parametrize(
    "entry",
    [
        "labels_toy",
        ["labels_toy", "images", "labels"],
        ["labels_toy", "images", "labels", []],
        ["labels_toy", "images", "labels", "sky"],
        ["labels_toy", "images", 3, ["sky"]],
    ],
)
def test_malformed_entries(entry):
    cfg = segmentor_cfg()
    cfg.KD.SEM_SEG_DATASETS = [entry]
    with pytest.raises(ConfigError, match="KD.SEM_SEG_DATASETS: .* is not "):
        register_configured(cfg)


def test_folders_and_names_that_do_not_fit(folders, name):
    cfg = toy_cfg(folders, name)
    cfg.KD.SEM_SEG_DATASETS[0][2] = str(folders / "nothing")
    with pytest.raises(ConfigError, match="there is no folder .*nothing"):
        register_configured(cfg)
    with pytest.raises(ConfigError, match="'shapes_train' is an existing data set"):
        register_configured(toy_cfg(folders, "shapes_train"))


def test_files_that_do_not_fit(folders, name):
    register_configured(toy_cfg(folders, name))
    labels = folders / "labels" / "city" / "1.png"
    cv2.imwrite(str(labels), np.zeros((32, 47), np.uint8))
    with pytest.raises(DataError, match=r"city/1.png: the label map has 47x32 .* has 48x32"):
        DatasetCatalog.get(name)
    labels.write_text("no image")
    with pytest.raises(DataError, match=r"city/1.png: image cannot be read"):
        DatasetCatalog.get(name)
    labels.unlink()
    with pytest.raises(DataError, match=r"city/1.jpg: its label map is missing: no file .*1.png"):
        DatasetCatalog.get(name)


def test_an_empty_folder(tmp_path, name):
    (tmp_path / "images").mkdir(exist_ok=True)
    for file in (tmp_path / "images").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match="no image"):
        sem_seg.load_sem_seg(str(tmp_path / "images"), str(tmp_path / "labels"))


def test_training_on_files_that_do_not_fit(folders, name):
    """Other data sets are not read in advance: the mapper says which file it is."""
    cfg = toy_cfg(folders, name)
    register_configured(cfg)
    record = DatasetCatalog.get(name)[0]
    mapper = build_train_mapper(cfg)
    path = record["sem_seg_file_name"]
    cv2.imwrite(path, np.zeros((16, 48), np.uint8))
    with pytest.raises(DataError, match="0.png: the label map has 48x16 pixels, .*0.jpg has 48x32"):
        mapper(dict(record))
    cv2.imwrite(path, np.full((32, 48), 7, np.uint8))
    with pytest.raises(DataError, match="0.png: label 7 is no class: .*NUM_CLASSES is 3"):
        mapper(dict(record))
    cv2.imwrite(path, np.full((32, 48), 255, np.uint8))
    assert mapper(dict(record)) is None, "another image takes the place of one without labels"
    del record["sem_seg_file_name"]
    with pytest.raises(DataError, match="0.jpg has no label map"):
        mapper(record)


def test_a_batch_without_any_label_never_comes_up(folders, name):
    """Of four images three have no labels: every place is taken by the fourth."""
    cfg = toy_cfg(folders, name)
    register_configured(cfg)
    for record in DatasetCatalog.get(name)[1:]:
        cv2.imwrite(record["sem_seg_file_name"], np.full((32, 48), 255, np.uint8))
    stream = iter(build_train_loader(cfg))
    for _ in range(4):
        assert all((item["sem_seg"] != 255).any() for item in next(stream))


def test_crops_after_resizing(folders, name):
    crop = {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute"}
    crop |= {"INPUT__CROP__SIZE": [40, 40], "INPUT__CROP__AFTER_RESIZE": True}
    cfg = toy_cfg(folders, name, **crop)
    register_configured(cfg)
    batch = next(iter(build_train_loader(cfg)))
    assert all(item["image"].shape == (3, 40, 40) for item in batch)
    cfg.INPUT.CROP.ENABLED = False
    with pytest.raises(ConfigError, match="INPUT.CROP.AFTER_RESIZE needs INPUT.CROP.ENABLED"):
        build_train_mapper(cfg)


def scores(cfg, name, predictions):
    evaluator = build_evaluator(cfg, name, None)
    evaluator._output_dir = None
    evaluator.reset()
    for record, labels in zip(DatasetCatalog.get(name), predictions, strict=True):
        logits = torch.nn.functional.one_hot(labels, 3).movedim(-1, 0).float()
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg": logits}])
    return evaluator.evaluate()["sem_seg"]


def test_evaluation_ignores_255_and_classes_that_never_occur(folders, name):
    cfg = toy_cfg(folders, name)
    register_configured(cfg)
    for record in DatasetCatalog.get(name):
        labels = np.full((32, 48), 255, np.uint8)
        labels[:8], labels[8:16] = 0, 1
        cv2.imwrite(record["sem_seg_file_name"], labels)
    perfect = torch.full((32, 48), 2)
    perfect[:8], perfect[8:16] = 0, 1
    assert scores(cfg, name, [perfect] * 4)["mIoU"] == pytest.approx(100.0)
    half = perfect.clone()
    half[8:16] = 0  # all of class 1 is called 0: IoU 50 % and 0 %, class 2 does not count
    assert scores(cfg, name, [half] * 4)["mIoU"] == pytest.approx(25.0)


def test_evaluation_of_labels_that_do_not_fit(folders, name):
    cfg = toy_cfg(folders, name)
    register_configured(cfg)
    first = DatasetCatalog.get(name)[0]["sem_seg_file_name"]
    with pytest.raises(DataError, match="0.png: the label map has 48x32 .* prediction 48x30"):
        scores(cfg, name, [torch.zeros(30, 48, dtype=torch.long)] * 4)
    cv2.imwrite(first, np.full((32, 48), 9, np.uint8))
    with pytest.raises(DataError, match="0.png: label 9 is none of 3 classes"):
        scores(cfg, name, [torch.zeros(32, 48, dtype=torch.long)] * 4)


def test_a_segmentor_on_shapes_is_evaluated_on_label_maps_only():
    evaluator = build_evaluator(segmentor_cfg(), "shapes_val", "unused")
    assert type(evaluator).__name__ == "SemanticEvaluator"


def test_a_segmentor_needs_label_maps():
    with pytest.raises(ConfigError, match="'keypoints_coco_2017_val' .*has no label maps"):
        build_evaluator(segmentor_cfg(), "keypoints_coco_2017_val", "unused")


def test_cityscapes_without_its_files_is_refused():
    cfg = segmentor_cfg(MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    cfg.DATASETS.TRAIN = ("cityscapes_fine_sem_seg_train",)
    cfg.DATASETS.TEST = ("cityscapes_fine_sem_seg_val",)
    with pytest.raises(ConfigError, match="DATASETS.T.*needs the folder .*cityscapes.*DETECTRON2"):
        check_config(cfg)
