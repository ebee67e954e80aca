"""Every detector with every head on features: train, checkpoint, load in plain detectron2."""

from __future__ import annotations

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos as stock_fcos
from kd_detectors import DETECTORS, detector_cfg, detector_distill_cfg, full_batch
from kd_models import build_wrapper, losses_at, train_steps, write_teacher

from projects.kd import student_of
from projects.kd.analysis.support import feature_heads
from projects.kd.engine.checkpoint import DistillCheckpointer, Heads
from projects.kd.heads import IMITATION_HEAD_REGISTRY

SMALL = {
    "KD__ICD__DIM": 16,
    "KD__ICD__HEADS": 2,
    "KD__ICD__FFN_DIM": 16,
    "KD__ICD__MAX_QUERIES": 8,
    "KD__ICD__PRIORS": "uniform",
    "KD__ICD__DETACH_ITERS": 0,
    "KD__FGFI__WEIGHT": 0.001,
    "KD__PKD__WEIGHT": 0.1,
    "KD__CWD__WEIGHT": 0.1,
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Detector to the paths of a teacher of its own family."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("teacher")
            made[name] = write_teacher(folder, detector_cfg(name))
        return made[name]

    return get


def save(model, folder) -> None:
    """``student.pth``, as the training loop writes it."""
    checkpointer = DistillCheckpointer(student_of(model), str(folder), distill=Heads(model.heads))
    checkpointer.save("student")


def same_outputs(expected, found) -> int:
    """Compares lists of detectron2 outputs bit by bit; returns how many detections there were."""
    number = 0
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        fields = one["instances"].get_fields()
        assert fields.keys() == other["instances"].get_fields().keys()
        for key, value in fields.items():
            value, twin = (getattr(x, "tensor", x) for x in (value, other["instances"].get(key)))
            assert torch.equal(value, twin), key
        number += len(one["instances"])
        if "sem_seg" in one:
            assert torch.equal(one["sem_seg"], other["sem_seg"])
    return number


@pytest.mark.parametrize("name", list(DETECTORS))
def test_trains_with_all_feature_heads_and_deploys(name, teachers, tmp_path):
    heads = feature_heads(detector_cfg(name))
    cfg = detector_distill_cfg(name, teachers(name), heads, **SMALL)
    model = build_wrapper(cfg)
    batch = full_batch()
    before = {k: v.clone() for k, v in student_of(model).state_dict().items()}
    train_steps(model, batch, steps=2, lr=1e-3)
    after = student_of(model).state_dict()
    assert any(not torch.equal(before[k], v) for k, v in after.items() if "backbone" in k)
    with torch.no_grad():  # an assistant that starts at zero has hardly moved in two steps
        for parameter in [p for head in model.heads.values() for p in head.aux_parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    losses = losses_at(model, batch, iteration=10**5)  # every schedule has begun
    for head in heads:
        own = [v for k, v in losses.items() if k.startswith(f"loss_kd_{head.lower()}")]
        assert own, f"{head} returned no loss"
        assert all(loss.isfinite() for loss in own) and sum(own) > 0, head

    save(model, tmp_path)
    plain = build_model(detector_cfg(name))
    saved = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    assert saved.keys() == plain.state_dict().keys()
    DetectionCheckpointer(plain).load(str(tmp_path / "student.pth"))
    with torch.no_grad():
        expected = student_of(model).eval()(full_batch(seed=5))
        found = plain.eval()(full_batch(seed=5))
    assert same_outputs(expected, found) > 0


@pytest.mark.parametrize("name", list(DETECTORS))
def test_mixed_precision_changes_losses_by_its_rounding_only(name, teachers):
    """Student under autocast, teacher in bfloat16, as SOLVER.AMP and KD.TEACHER.DTYPE ask."""
    heads = ("CWD", "PKD")
    lower = detector_distill_cfg(name, teachers(name), heads, KD__TEACHER__DTYPE="bfloat16")
    found = []
    for cfg in (detector_distill_cfg(name, teachers(name), heads), lower):
        torch.manual_seed(0)
        model = build_wrapper(cfg)
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg is lower):
            losses = losses_at(model, full_batch(), iteration=10**5)
        sum(losses.values()).backward()
        gradients = [p.grad for p in student_of(model).parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        found.append({key: loss.detach().float() for key, loss in losses.items()})
    exact, rounded = found
    assert exact.keys() == rounded.keys()
    for key, loss in exact.items():
        torch.testing.assert_close(rounded[key], loss, rtol=0.1, atol=0.01, msg=key)


def test_fcos_deploys_in_detectron2s_own_class(teachers, tmp_path):
    model = build_wrapper(detector_distill_cfg("FCOS", teachers("FCOS"), ("CWD",)))
    train_steps(model, full_batch(), steps=1, lr=1e-3)
    save(model, tmp_path)
    outline = build_model(detector_cfg("FCOS"))
    stock = stock_fcos.FCOS(
        backbone=outline.backbone,
        head=outline.head,
        head_in_features=outline.head_in_features,
        num_classes=3,
        test_score_thresh=0.0,
        pixel_mean=outline.pixel_mean.flatten().tolist(),
        pixel_std=outline.pixel_std.flatten().tolist(),
    )
    DetectionCheckpointer(stock).load(str(tmp_path / "student.pth"))
    with torch.no_grad():
        expected = student_of(model).eval()(full_batch(seed=5))
        assert same_outputs(expected, stock.eval()(full_batch(seed=5))) > 0


PAIRS = [
    ("FCOS", "RetinaNet", ("p3", "p4", "p5", "p6", "p7")),
    ("RetinaNet", "Cascade Mask R-CNN", ("p3", "p4", "p5")),
    ("Faster R-CNN", "FCOS", ("p3", "p4", "p5")),
    ("Faster R-CNN", "Cascade R-CNN", ("p2", "p3", "p4", "p5", "p6")),
    ("GFL", "RepPoints", ("p3", "p4", "p5", "p6", "p7")),
]


@pytest.mark.parametrize(("student", "teacher", "levels"), PAIRS)
def test_families_are_paired_by_stride_and_by_what_made_the_level(
    student, teacher, levels, teachers
):
    """R-CNN's p6 is a subsampled p5, that of one-stage detectors a convolution: never paired."""
    heads = feature_heads(detector_cfg(student), detector_cfg(teacher))
    model = build_wrapper(detector_distill_cfg(student, teachers(teacher), heads, **SMALL))
    assert model.heads["CWD"].levels == levels
    assert all(loss.isfinite() for loss in losses_at(model, full_batch()).values())


def test_a_cascade_stage_may_have_no_proposal(teachers):
    """No object and boxes outside of the image leave the last stages empty."""
    model = build_wrapper(
        detector_distill_cfg(
            "Cascade Mask R-CNN", teachers("Cascade Mask R-CNN"), ("CWD", "ICD"), **SMALL
        )
    )
    model.student.roi_heads.box_predictor[0].box2box_transform.scale_clamp = -20.0
    losses = losses_at(model, full_batch(boxes=0))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_heads_on_features_are_found():
    """One that is added later is in the tests above by itself."""
    own = {name for name, cls in IMITATION_HEAD_REGISTRY if cls.__module__.startswith("projects.")}
    for name in DETECTORS:
        heads = set(feature_heads(detector_cfg(name)))
        assert {"Mimic", "FGFI", "CWD", "ICD", "PKD"} <= heads <= own
