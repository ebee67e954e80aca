"""Test-time augmentation of one-stage detectors."""

import cv2
import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from kd_detectors import detector_cfg
from kd_models import build, make_batch

from projects.kd.errors import ConfigError
from projects.kd.evaluation.tta import DenseDetectorWithTTA, tta_class


def wrapped(name, sizes, flip):
    cfg = detector_cfg(name, TEST__AUG__MIN_SIZES=sizes, TEST__AUG__FLIP=flip)
    model = build(cfg).eval()
    return model, tta_class(cfg)(cfg, model)


def detect(model, example):
    with torch.no_grad():
        return model([example])[0]["instances"]


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "GFL", "RepPoints"])
def test_the_image_as_it_is_gives_the_models_own_detections(name):
    model, tta = wrapped(name, (64,), False)
    assert isinstance(tta, DenseDetectorWithTTA)
    example = make_batch(((64, 96),))[0]
    own, found = detect(model, example), detect(tta, example)
    # boxes are cut at the border before they are joined, so that a few more may be suppressed
    assert 0 < len(found) <= len(own)
    rows = [
        torch.cat([x.pred_boxes.tensor, x.scores[:, None], x.pred_classes[:, None]], 1)
        for x in (own, found)
    ]
    torch.testing.assert_close(rows[1][0], rows[0][0], rtol=1e-4, atol=1e-3)
    distance = (rows[1][:, None] - rows[0][None]).abs().amax(2)
    assert distance.amin(1).max() < 0.01, "one that the model did not find"


def test_with_flips_a_mirrored_image_gives_mirrored_detections():
    _, tta = wrapped("FCOS", (64, 96), True)
    example = make_batch(((64, 96),))[0]
    mirrored = {**example, "image": example["image"].flip(2)}
    own, found = detect(tta, example), detect(tta, mirrored)
    assert len(found) == len(own) > 0
    order, twin = (x.scores.argsort(descending=True)[:10] for x in (own, found))
    torch.testing.assert_close(found.scores[twin], own.scores[order], rtol=1e-4, atol=1e-6)
    boxes = own.pred_boxes.tensor[order]
    expected = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1)
    torch.testing.assert_close(found.pred_boxes.tensor[twin], expected, rtol=1e-3, atol=0.05)


def test_files_are_read_at_their_full_size(tmp_path):
    """The loader's small version is not what is enlarged."""
    _, tta = wrapped("FCOS", (64,), False)
    full = make_batch(((64, 96),))[0]
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, full["image"].permute(1, 2, 0).numpy())
    example = {"image": torch.zeros(3, 32, 48), "file_name": path, "height": 64, "width": 96}
    expected = detect(tta, full)
    torch.testing.assert_close(detect(tta, example).scores, expected.scores)


def test_which_detectors_can():
    assert tta_class(detector_cfg("Mask R-CNN")) is GeneralizedRCNNWithTTA
    with pytest.raises(ConfigError, match="TEST.AUG.ENABLED: PanopticFPN"):
        tta_class(detector_cfg("Panoptic FPN"))
