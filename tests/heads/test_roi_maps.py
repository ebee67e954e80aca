"""CWD on masks and keypoints: the teacher answers for the student's own foreground proposals."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from kd_detectors import detector_cfg, detector_distill_cfg, full_batch
from kd_models import build_wrapper, losses_at, write_teacher

from projects.kd.errors import ConfigError
from projects.kd.functional.cwd import cwd_loss

FAMILY = {
    "masks": ("Mask R-CNN", "Cascade Mask R-CNN", "Panoptic FPN"),
    "keypoints": ("Keypoint R-CNN",),
}
CASES = [(target, name) for target, names in FAMILY.items() for name in names]


def wrapper(tmp_path, target, name, teacher=None, **overrides):
    paths = write_teacher(tmp_path, detector_cfg(teacher or name))
    cfg = detector_distill_cfg(name, paths, ("CWD",), KD__CWD__TARGET=target, **overrides)
    return build_wrapper(cfg)


def observe(model, batch):
    with EventStorage(0):
        return model.observe(batch)


@pytest.mark.parametrize(("target", "name"), CASES)
def test_the_teachers_maps_are_those_of_a_loop_over_regions(tmp_path, target, name):
    """Each region pooled and predicted alone, by the teacher; the student's by its own head."""
    model = wrapper(tmp_path, target, name)
    part = target.removesuffix("s")
    ctx, _ = observe(model, full_batch(boxes=3))
    roi = model.heads["CWD"].roi
    student, teacher = roi.read(ctx)
    regions = roi.regions(ctx)
    number = sum(len(x) for x in regions)
    assert number > 3 and len(student) == len(teacher) == number
    assert student.requires_grad and not teacher.requires_grad
    row = 0
    for side, maps in ((ctx.student, ctx.student_features), (model.teacher.model, None)):
        row, found = 0, student if maps is not None else teacher
        maps = ctx.teacher_features if maps is None else maps
        heads = side.roi_heads
        for image, instances in enumerate(regions):
            for i in range(len(instances)):
                features = [
                    maps[f][image : image + 1] for f in getattr(heads, f"{part}_in_features")
                ]
                box = [Boxes(instances.proposal_boxes.tensor[i : i + 1])]
                pooled = getattr(heads, f"{part}_pooler")(features, box)
                expected = getattr(heads, f"{part}_head").layers(pooled)[0]
                if target == "masks":
                    expected = expected[instances.gt_classes[i]][None]
                torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
                row += 1
        assert row == number
    loss = model.heads["CWD"](ctx)["loss_kd_cwd"]
    torch.testing.assert_close(loss, model.heads["CWD"].weight * cwd_loss(student, teacher))
    assert loss > 0


@pytest.mark.parametrize(("target", "name"), [CASES[0], CASES[-1]])
def test_gradient_reaches_the_branch_and_the_backbone(tmp_path, target, name):
    model = wrapper(tmp_path, target, name)
    ctx, _ = observe(model, full_batch())
    model.heads["CWD"](ctx)["loss_kd_cwd"].backward()
    part = target.removesuffix("s")
    grads = {k: p.grad for k, p in model.student.named_parameters() if p.grad is not None}
    for start in (f"roi_heads.{part}_head", "backbone.fpn_output", "backbone.bottom_up"):
        assert any(k.startswith(start) and g.any() for k, g in grads.items()), start
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize(("target", "name"), [CASES[0], CASES[-1]])
def test_without_objects_the_loss_is_zero_and_keeps_its_graph(tmp_path, target, name):
    model = wrapper(tmp_path, target, name)
    losses = losses_at(model, full_batch(boxes=0))
    assert losses["loss_kd_cwd"].item() == 0
    sum(losses.values()).backward()
    part = target.removesuffix("s")
    for key, parameter in model.student.named_parameters():
        if f"{part}_head" in key:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_a_teacher_that_sees_twice_the_size_pools_from_boxes_of_twice_the_size(tmp_path):
    model = wrapper(tmp_path, "masks", "Mask R-CNN", KD__TEACHER__INPUT_SCALE=2.0)
    ctx, _ = observe(model, full_batch(teacher_scale=2.0))
    roi = model.heads["CWD"].roi
    regions = roi.regions(ctx)
    heads = model.teacher.model.roi_heads
    features = [ctx.teacher_features[f] for f in heads.mask_in_features]
    boxes = [Boxes(2 * x.proposal_boxes.tensor) for x in regions]
    logits = heads.mask_head.layers(heads.mask_pooler(features, boxes))
    classes = torch.cat([x.gt_classes for x in regions])
    expected = logits[torch.arange(len(classes)), classes][:, None]
    assert ctx.teacher_features["p2"].shape[-1] == 2 * ctx.student_features["p2"].shape[-1]
    torch.testing.assert_close(roi.read(ctx)[1], expected)


def test_a_student_equal_to_its_teacher_costs_nothing(tmp_path):
    for target, name in (CASES[0], CASES[-1]):
        (tmp_path / target).mkdir()
        model = wrapper(tmp_path / target, target, name)
        model.student.load_state_dict(model.teacher.model.state_dict())
        model.student.eval()  # statistics of BatchNorm as the teacher has them
        model.student.training = model.student.roi_heads.training = True
        for module in model.student.modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        ctx, _ = observe(model, full_batch())
        assert model.heads["CWD"](ctx)["loss_kd_cwd"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("target", "student", "teacher"),
    [
        ("masks", "Faster R-CNN", "Mask R-CNN"),
        ("masks", "Mask R-CNN", "Faster R-CNN"),
        ("keypoints", "Mask R-CNN", "Keypoint R-CNN"),
        ("masks", "FCOS", "Mask R-CNN"),
        ("masks", "Mask R-CNN", "RetinaNet"),
    ],
)
def test_detectors_without_the_branch_are_refused(tmp_path, target, student, teacher):
    with pytest.raises(ConfigError, match=f"KD.CWD.TARGET: '{target}' needs a (student|teacher)"):
        wrapper(tmp_path, target, student, teacher)


def test_other_numbers_of_keypoints_or_classes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="5 keypoints and the teacher 4"):
        wrapper(
            tmp_path,
            "keypoints",
            "Keypoint R-CNN",
            MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=5,
        )
    with pytest.raises(ConfigError, match="masks of 1 classes and the teacher masks of 3"):
        wrapper(tmp_path, "masks", "Mask R-CNN", MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True)


def test_levels_have_no_meaning_here(tmp_path):
    with pytest.raises(ConfigError, match="KD.CWD.LEVELS"):
        wrapper(tmp_path, "masks", "Mask R-CNN", KD__CWD__LEVELS=("p3",))


def test_an_unpaired_level_of_the_teacher_is_refused(tmp_path):
    levels = [["p3", "p3"], ["p4", "p4"], ["p5", "p5"]]
    with pytest.raises(ConfigError, match="KD.LEVEL_MAP.*no level of the student: p2"):
        wrapper(tmp_path, "masks", "Mask R-CNN", KD__LEVEL_MAP=levels)
