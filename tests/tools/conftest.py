"""A tiny pair of detectors and a data set on the disk, for all tests of tools."""

import json

import kd_models
import numpy as np
import pytest
import toy_data  # noqa: F401  (registers the toy backbone)
from PIL import Image

DATA = "kd_test_tools"
BACKBONE = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="session")
def data(folder):
    """A KD.DATASETS entry of six images with two objects each."""
    random = np.random.RandomState(0)
    images, annotations = [], []
    for i in range(6):
        pixels = random.randint(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        for k in range(2):
            item = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + (i + k) % 3}
            annotations.append(item | {"bbox": [4 + 28 * k, 5 + i, 20, 24], "area": 480})
            annotations[-1]["iscrowd"] = 0
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate("abc")]
    path = folder / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return [[DATA, str(path), str(folder)]]


def settings(data, folder) -> dict:
    return {
        **BACKBONE,
        "KD__DATASETS": data,
        "DATASETS__TRAIN": (DATA,),
        "DATASETS__TEST": (DATA,),
        "INPUT__MIN_SIZE_TRAIN": (48,),
        "SOLVER__IMS_PER_BATCH": 2,
        "SEED": 3,
        "OUTPUT_DIR": str(folder / "out"),
    }


@pytest.fixture(scope="session")
def config(folder, data):
    """Path of a distillation config with a teacher of its own input size and channel order."""
    teacher = kd_models.tiny_cfg(**settings(data, folder), INPUT__FORMAT="RGB")
    teacher.INPUT.MIN_SIZE_TEST, teacher.INPUT.MAX_SIZE_TEST = 96, 128
    files = kd_models.write_teacher(folder, teacher)
    cfg = kd_models.distill_cfg(
        files, heads=("Mimic", "FGFI", "CWD"), KD__START_ITER=5, **settings(data, folder)
    )
    cfg.KD.FGFI.WEIGHT, cfg.KD.CWD.WEIGHT = 0.25, 3.0
    return kd_models.write_config(cfg, folder / "student.yaml")
