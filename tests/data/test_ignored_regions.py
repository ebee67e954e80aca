"""Ignored regions in training: painted out for every detector, or kept."""

import kd_models
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from projects.kd import ConfigError, check_config
from projects.kd.data.ignored_regions import paint_out
from projects.kd.data.mapper import build_train_mapper

SIZE = (64, 96)  # height, width
REGION = [50, 10, 30, 40]  # XYWH
OBJECT = [44, 20, 16, 16]  # overlaps the region
MEAN = [103.53, 116.28, 123.675]


def entry(folder, seed, regions=(REGION,), name="image"):
    """An image whose pixels in the region follow the seed, and all others do not."""
    pixels = np.random.RandomState(0).randint(0, 255, (*SIZE, 3), dtype=np.uint8)
    x, y, w, h = REGION
    inside = np.random.RandomState(seed).randint(0, 255, (h, w, 3), dtype=np.uint8)
    ox, oy, ow, oh = OBJECT
    keep = pixels[oy : oy + oh, ox : ox + ow].copy()
    pixels[y : y + h, x : x + w] = inside
    pixels[oy : oy + oh, ox : ox + ow] = keep
    path = folder / f"{name}_{seed}.png"
    Image.fromarray(pixels).save(path)
    annotation = {"bbox": OBJECT, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    result = {"file_name": str(path), "image_id": 1, "height": SIZE[0], "width": SIZE[1]}
    return {**result, "annotations": [annotation], "ignored_regions": [list(r) for r in regions]}


def config(arch="RetinaNet", **options):
    size = {"INPUT__MIN_SIZE_TRAIN": (SIZE[0],), "INPUT__RANDOM_FLIP": "none"}
    return kd_models.tiny_cfg(arch, **size, **options)


def mapped(cfg, dataset_dict, seed=0):
    np.random.seed(seed)
    return build_train_mapper(cfg)(dataset_dict)


def test_paint_out_by_hand():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    colour = torch.tensor([100.4, 100.6, 7.0]).view(3, 1, 1)
    regions = np.array([[-3.0, -1.0, 1.6, 2.4], [4, 3, 60, 60], [20, 20, 30, 30]])
    painted = paint_out(image, regions, np.array([[0.9, 1.1, 1.2, 1.9]]), colour)
    mask = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],  # both cells belong to pixels that the box touches
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    for channel, value in enumerate((100, 101, 7)):
        assert (painted[channel][mask] == value).all()
    assert torch.equal(painted[:, ~mask], image[:, ~mask])


def test_regions_are_painted_and_objects_are_not(tmp_path):
    image = mapped(config(), entry(tmp_path, 1))["image"]
    x, y, w, h = REGION
    ox, oy, ow, oh = OBJECT
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[y : y + h, x : x + w] = True
    mask[oy : oy + oh, ox : ox + ow] = False
    mean = torch.tensor(MEAN).round().view(3, 1)
    assert (image[:, mask] == mean).all()
    kept = mapped(config(INPUT__IGNORED_REGIONS="keep"), entry(tmp_path, 1))["image"]
    assert torch.equal(image[:, ~mask], kept[:, ~mask])
    assert (kept[:, mask] == mean).float().mean() < 0.1


def test_regions_follow_the_augmentation(tmp_path):
    """Flipped, scaled and cropped like the image: what is painted is what was random."""
    options = {
        "INPUT__MIN_SIZE_TRAIN": (SIZE[0] * 2,),
        "INPUT__RANDOM_FLIP": "horizontal",
        "INPUT__CROP__ENABLED": True,
        "INPUT__CROP__TYPE": "absolute",
        "INPUT__CROP__SIZE": [50, 70],
    }
    cfg = kd_models.tiny_cfg(**options)
    for seed in range(8):
        one, two = (mapped(cfg, entry(tmp_path, s), seed)["image"] for s in (1, 2))
        raw = kd_models.tiny_cfg(**options, INPUT__IGNORED_REGIONS="keep")
        before = [mapped(raw, entry(tmp_path, s), seed)["image"] for s in (1, 2)]
        assert (before[0] != before[1]).float().mean() > 0.05
        # only the blend of a resized region's rim is left
        changed = (one != two).any(0)
        assert changed.float().mean() < 0.12 * (before[0] != before[1]).any(0).float().mean()


def test_images_without_regions_are_detectron2s(tmp_path):
    plain = entry(tmp_path, 1, regions=())
    del plain["ignored_regions"]
    a, b = (mapped(config(INPUT__IGNORED_REGIONS=v), plain) for v in ("paint", "keep"))
    assert torch.equal(a["image"], b["image"])
    assert a["instances"].gt_boxes.tensor.tolist() == [[44, 20, 60, 36]]
    both = mapped(config(), entry(tmp_path, 1, regions=()))
    assert torch.equal(both["image"], a["image"]) and "ignored_regions" not in both


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)  # R-CNN samples anchors and proposals
    losses = kd_models.losses_at(model, batch)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return losses, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_nothing_in_a_region_is_learnt(tmp_path, arch):
    """Two images that differ in the region only: the same losses and gradients, unless kept."""
    results = {}
    for value in ("paint", "keep"):
        cfg = config(arch, INPUT__IGNORED_REGIONS=value)
        for seed in (1, 2):
            model = kd_models.build(cfg).train()
            results[value, seed] = losses_and_gradients(model, [mapped(cfg, entry(tmp_path, seed))])
    one, two = results["paint", 1], results["paint", 2]
    assert one[0] == two[0] and torch.allclose(one[1], two[1], rtol=1e-5, atol=1e-7)
    one, two = results["keep", 1], results["keep", 2]
    assert one[0] != two[0] and not torch.allclose(one[1], two[1], atol=1e-4)
    assert results["keep", 1][0] != results["paint", 1][0]


def test_distillation_reads_nothing_in_a_region(tmp_path):
    teacher = kd_models.write_teacher(tmp_path)
    results = []
    for seed in (1, 2):
        cfg = kd_models.distill_cfg(
            teacher,
            heads=("Mimic",),
            INPUT__MIN_SIZE_TRAIN=(SIZE[0],),
            INPUT__RANDOM_FLIP="none",
        )
        batch = [mapped(cfg, entry(tmp_path, seed))]
        results.append(kd_models.losses_at(kd_models.build_wrapper(cfg), batch))
    assert results[0] == results[1] and results[0]["loss_kd_mimic"] > 0


def test_the_teachers_larger_image_is_painted_too(tmp_path):
    teacher = {"KD__META_ARCHITECTURE": "DistillMetaArch", "KD__TEACHER__INPUT_SCALE": 2.0}
    flip = {"INPUT__RANDOM_FLIP": "horizontal"}
    for seed in range(4):
        cfg = config(**teacher) if seed else kd_models.tiny_cfg(**teacher, **flip)
        one, two = (mapped(cfg, entry(tmp_path, s), seed)["image_teacher"] for s in (1, 2))
        assert one.shape[-1] == 2 * mapped(cfg, entry(tmp_path, 1), seed)["image"].shape[-1]
        cfg.INPUT.IGNORED_REGIONS = "keep"
        before = [mapped(cfg, entry(tmp_path, s), seed)["image_teacher"] for s in (1, 2)]
        share = (before[0] != before[1]).any(0).float().mean()
        assert share > 0.1 and (one != two).any(0).float().mean() < 0.15 * share


def test_another_value_is_refused():
    with pytest.raises(
        ConfigError, match="INPUT.IGNORED_REGIONS is 'drop', it must be one of 'paint'"
    ):
        check_config(
            kd_models.tiny_cfg(INPUT__IGNORED_REGIONS="drop", MODEL__RETINANET__NUM_CLASSES=6)
        )
