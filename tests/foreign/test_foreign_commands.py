"""kd-evaluate teacher and kd-pseudo-label give what torchvision's detectors find themselves."""

import json

import foreign_models  # noqa: F401  # registers kd_tiny_mask_rcnn and others
import kd_models
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models import get_model

from projects.kd.commands import pseudo_label
from projects.kd.commands.evaluate import PARTS as EVALUATE

KINDS = {  # name to classes
    "kd_tiny_mask_rcnn": ["cat", "person"],
    "kd_tiny_keypoint_rcnn": ["person"],
    "kd_tiny_retinanet": ["cat", "person"],
}


@pytest.fixture(params=KINDS)
def given(request, tmp_path):
    """A config with such a teacher, torchvision's own model, and the images that both see."""
    name, classes = request.param, KINDS[request.param]
    images, annotations = [], []
    for i in range(2):
        pixels = np.random.RandomState(i).randint(0, 255, (48, 64 + 8 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64 + 8 * i})
        box = [4.0, 6.0, 30.0, 20.0]
        around = [4, 6, 34, 6, 34, 26, 4, 26]
        common = {"image_id": i, "bbox": box, "area": 600, "iscrowd": 0, "segmentation": [around]}
        points = {"keypoints": [8, 9, 2] * 17, "num_keypoints": 17}
        annotations.append({"id": i + 1, "category_id": 1, **common, **points})
    categories = [{"id": k, "name": x} for k, x in enumerate(classes, start=1)]
    if "keypoint" in name:
        categories[0]["keypoints"] = MetadataCatalog.get("keypoints_coco_2017_train").keypoint_names
    tables = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(tables))
    torch.manual_seed(6)
    model = get_model(name, num_classes=len(classes) + 1).eval()
    if name == "kd_tiny_retinanet":
        torch.nn.init.constant_(model.head.classification_head.cls_logits.bias[:1], -20)  # label 0
    torch.save(model.state_dict(), tmp_path / "net.pth")
    data = f"foreign_{tmp_path.name}"
    cfg = kd_models.distill_cfg(
        (f"torchvision://{name}", str(tmp_path / "net.pth")),
        MODEL__RETINANET__NUM_CLASSES=len(classes),
        KD__TEACHER__OPTS=["CLASSES", classes],
        KD__DATASETS=[[data, str(tmp_path / "data.json"), str(tmp_path)]],
        DATASETS__TRAIN=(data,),
        DATASETS__TEST=(data,),
        OUTPUT_DIR=str(tmp_path / "out"),
    )
    return kd_models.write_config(cfg, tmp_path / "cfg.yaml"), model, tmp_path


@torch.no_grad()
def own(model, folder, i: int) -> dict:
    image = torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1)
    return model([image / 255])[0]


def compare(found: list[dict], expected: dict) -> None:
    """Rows of a COCO file of one image against torchvision's detections."""
    found = sorted(found, key=lambda x: -x["score"])
    assert len(found) == len(expected["boxes"]) > 0
    boxes = torch.tensor([x["bbox"] for x in found])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, expected["boxes"], rtol=1e-4, atol=0.02)
    scores = torch.tensor([x["score"] for x in found])
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-4, atol=1e-4)
    assert [x["category_id"] for x in found] == expected["labels"].tolist()
    if "masks" in expected:
        masks = np.stack([coco_mask.decode(x["segmentation"]) for x in found])
        assert np.array_equal(masks, (expected["masks"][:, 0] > 0.5).numpy())
    if "keypoints" in expected:
        points = torch.tensor([x["keypoints"] for x in found]).unflatten(1, (17, 3))[..., :2]
        wanted = expected["keypoints"][..., :2]
        shift = (points - wanted).abs().amax()  # detectron2's rows have half a pixel less
        assert shift <= 0.51


def test_results_are_torchvisions_own(given):
    config, model, folder = given
    report = EVALUATE.call(["teacher", "--config-file", config])
    kinds = {"kd_tiny_mask_rcnn": "segm", "kd_tiny_keypoint_rcnn": "keypoints"}
    expected = {"bbox"} | {x for name, x in kinds.items() if name in report["teacher"]}
    assert set(report["results"]) == expected
    (path,) = (folder / "out" / "teacher_evaluation").rglob("coco_instances_results.json")
    rows = json.loads(path.read_text())
    for i in range(2):
        compare([x for x in rows if x["image_id"] == i], own(model, folder, i))


@pytest.mark.parametrize("given", ["kd_tiny_mask_rcnn", "kd_tiny_retinanet"], indirect=True)
def test_pseudo_labels_are_torchvisions_own(given, monkeypatch):
    config, model, folder = given
    monkeypatch.setattr(pseudo_label, "setup_logger", lambda **options: None)
    words = ["--config-file", config, "--images", str(folder), "--threshold", "0"]
    output = folder / "labels.json"
    pseudo_label.main(pseudo_label.parse_arguments([*words, "--output", str(output)]))
    tables = json.loads(output.read_text())
    names = {x["id"]: x["file_name"] for x in tables["images"]}
    for i in range(2):
        rows = [x for x in tables["annotations"] if names[x["image_id"]] == f"{i}.png"]
        expected = own(model, folder, i)
        if "masks" in expected:  # detections whose mask is empty are left out
            filled = (expected["masks"] > 0.5).flatten(1).any(1)
            expected = {key: value[filled] for key, value in expected.items()}
        compare(rows, expected)
