"""Random COCO files: another way to write the same scores the same, breakage never crashes."""

import copy
import json
import math
import random
import uuid

import pytest
from coco_files import (
    HEIGHT,
    WIDTH,
    config,
    detections,
    forget,
    plain,
    registered,
    run_lengths,
    scores,
)
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances, transform_instance_annotations
from detectron2.data.transforms import TransformList
from detectron2.structures import BoxMode

from projects.kd.data.loader import load_dataset_dicts
from projects.kd.data.needs import check_data_sets
from projects.kd.errors import UserError

# what may stand for a number that counts rows
IDS = {
    "plain": lambda i, rng: i,
    "zero": lambda i, rng: i - 1,
    "text": lambda i, rng: f"cam-{i:03d}",
    "digits": lambda i, rng: str(i),
    "zeros": lambda i, rng: f"{i:06d}",
    "uuid": lambda i, rng: str(uuid.UUID(int=rng.getrandbits(128))),
    "negative": lambda i, rng: i - 1000,
    "float": lambda i, rng: float(i),
    "part": lambda i, rng: i + 0.5,
    "large": lambda i, rng: 2**53 + i,
    "huge": lambda i, rng: 10**30 + i,
    "mixed": lambda i, rng: i if i % 2 else str(i),
}


def with_ids(content: dict, table: str, form: str, rng: random.Random) -> set[str]:
    """Give the rows of a table other ids, in place; the new ones as text."""
    new = {row["id"]: IDS[form](row["id"], rng) for row in content[table]}
    for row in content[table]:
        row["id"] = new[row["id"]]
    key = {"images": "image_id", "categories": "category_id"}.get(table)
    for row in content["annotations"] if key else ():
        row[key] = new[row[key]]
    return {str(value) for value in new.values()}


@pytest.mark.parametrize("fast", [False, True], ids=["pycocotools", "faster-coco-eval"])
def test_scores_do_not_depend_on_ids(tmp_path, fast):
    if fast:
        pytest.importorskip("faster_coco_eval")
    rng = random.Random(0)
    content = plain(rng)
    found = detections(content, 0)
    expected = scores(registered(tmp_path, f"ids_{fast}", content), found, fast)
    assert 5 < expected["bbox"]["AP"] < 95 and 5 < expected["segm"]["AP"] < 95
    for form in IDS:
        other = copy.deepcopy(content)
        images = with_ids(other, "images", form, rng)
        with_ids(other, "annotations", form, rng)
        # classes come by ascending id, whose order has to be clear
        classes = form if form not in ("mixed", "uuid") else "text"
        categories = with_ids(other, "categories", classes, rng)
        name = registered(tmp_path, f"ids_{fast}_{form}", other)
        assert scores(name, found, fast, str(tmp_path)) == expected, form
        written = json.loads((tmp_path / "coco_instances_results.json").read_text())
        assert {str(item["image_id"]) for item in written} == images
        assert {str(item["category_id"]) for item in written} == categories
        forget(name)


def another_writing(content: dict, rng: random.Random) -> str:
    """The text of a file that means the same."""
    content = copy.deepcopy(content)
    for table in ("images", "annotations", "categories"):
        forms = set(IDS) - ({"mixed", "uuid"} if table == "categories" else set())
        with_ids(content, table, rng.choice(sorted(forms)), rng)
    for row in content["annotations"]:
        if rng.random() < 0.5:
            row["iscrowd"] = rng.choice([None, False, "0", 0.0, "false"])
        elif rng.random() < 0.5:
            del row["iscrowd"]
        if rng.random() < 0.7:  # then that of the box, which plain files have
            row["area"] = rng.choice([None, "12", math.nan, -1, 0, [], math.inf])
        if rng.random() < 0.3:
            row["bbox"] = [rng.choice([float, str, int])(v) for v in row["bbox"]]
        (polygon,) = row["segmentation"]
        points = [polygon[i : i + 2] for i in range(0, len(polygon), 2)]
        row["segmentation"] = rng.choice([[polygon], polygon, points, [points], [polygon, []]])
        if rng.random() < 0.3:
            row["num_keypoints"] = None
        row["note"] = rng.choice([None, {"by": "me"}, 3])
    for row in content["images"]:
        row["width"] = rng.choice([WIDTH, float(WIDTH), str(WIDTH)])
    content["info"] = rng.choice([None, {}, "made by hand"])
    tables = list(content.items())
    rng.shuffle(tables)
    return rng.choice(["", "\ufeff"]) + json.dumps(dict(tables), indent=rng.choice([None, 1]))


@pytest.mark.parametrize("seed", range(8))
def test_files_that_mean_the_same_score_the_same(tmp_path, seed):
    rng = random.Random(seed)
    content = plain(rng)
    found = detections(content, seed)
    expected = scores(registered(tmp_path, f"same_{seed}", content), found, True)
    dicts = DatasetCatalog.get(f"same_{seed}")
    for number in range(4):
        name = registered(tmp_path, f"same_{seed}_{number}", another_writing(content, rng))
        own = scores(name, found, number % 2 == 0)
        assert set(own) == set(expected)
        for task in own:
            assert own[task] == pytest.approx(expected[task], abs=1e-6), task
        for entry, plain_entry in zip(DatasetCatalog.get(name), dicts, strict=True):
            assert {**entry, "image_id": 0} == {**plain_entry, "image_id": 0}
        check_data_sets(config(name, masks=True, keypoints=True), training=True)
        forget(name)


def test_run_lengths_score_as_their_polygons(tmp_path):
    content = plain(random.Random(3))
    found = detections(content, 3)
    expected = scores(registered(tmp_path, "runs_polygons", content), found, False)
    for as_list in (False, True):
        other = copy.deepcopy(content)
        for row in other["annotations"]:
            row["segmentation"] = run_lengths(row, as_list)
        name = registered(tmp_path, f"runs_{as_list}", other)
        assert scores(name, found, False) == expected
        cfg = config(name, masks=True)
        with pytest.raises(UserError, match=r"INPUT.MASK_FORMAT .* annotation 1 and 19 more of 20"):
            check_data_sets(cfg, training=True)
        cfg.INPUT.MASK_FORMAT = "bitmask"
        check_data_sets(cfg, training=True)
        entry = load_dataset_dicts(cfg, [name])[0]
        made = instances_of(entry, "bitmask")
        x, y, w, h = content["annotations"][0]["bbox"]
        assert made.gt_masks.tensor[0].sum() == w * h
        assert made.gt_masks.tensor[0, y : y + h, x : x + w].all()


JUNK = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "12",
        " ",
        "NaN",
        [],
        {},
        [[]],
        [[], []],
        [None],
        [1, 2],
        {"a": 1},
    ),
    *(0, 1, -1, 0.5, 7, 10**9, 10**40, 10**400, 2e8, -2e8, 1e308, math.nan, math.inf, -math.inf),
    [1, 2, 3, 4],
    [0.1, 0.2, 0.3, 0.4],
    [1, 1, math.nan, 5],
    [1, 1, 10**400, 5],
    [[math.nan] * 6],
    [[1, 2, 3, 2e8, 5, 6]],
    [[1, 2, 3, 4, 5]],
    [["a"] * 6],
    {"size": [HEIGHT, WIDTH], "counts": "~~~~"},
    {"size": [HEIGHT, WIDTH], "counts": "0" * 50},
    {"size": [2, 2], "counts": [4]},
    {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]},
    {"size": "x", "counts": 3},
    ["left_eye", 3],
    [[1], [2, 3], "x"],
]


def broken(content: dict, rng: random.Random) -> dict:
    """With up to three fields, of one or of all rows of a table, replaced or missing."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        table = rng.choice(["images", "annotations", "annotations", "annotations", "categories"])
        if rng.random() < 0.05 or not isinstance(content.get(table), list) or not content[table]:
            content[table] = rng.choice(JUNK)
            continue
        rows = content[table] if rng.random() < 0.3 else [rng.choice(content[table])]
        if not all(isinstance(row, dict) for row in rows):
            continue
        if rng.random() < 0.03:
            content[table].append(rng.choice(JUNK))
            continue
        key, junk = rng.choice(sorted(rows[0]) or ["id"]), rng.choice(JUNK)
        for row in rows:
            if rng.random() < 0.15:
                row.pop(key, None)
            elif isinstance(row.get(key), list) and row[key] and rng.random() < 0.4:
                row[key] = list(row[key])
                row[key][rng.randrange(len(row[key]))] = junk
            else:
                row[key] = junk
    return content


def instances_of(entry: dict, mask_format="polygon", masks=True, keypoints=True):
    """What detectron2's mapper makes of the annotations, without augmentation."""
    size = entry["height"], entry["width"]
    used = {"segmentation": masks, "keypoints": keypoints}
    rows = [copy.deepcopy(row) for row in entry["annotations"] if not row["iscrowd"]]
    rows = [{key: value for key, value in row.items() if used.get(key, True)} for row in rows]
    rows = [transform_instance_annotations(row, TransformList([]), size) for row in rows]
    return annotations_to_instances(rows, size, mask_format)


@pytest.mark.parametrize("part", range(4))
def test_random_breakage_is_one_line_or_left_out(tmp_path, part):
    outcomes = {"refused": 0, "used": 0}
    for seed in range(part * 60, part * 60 + 60):
        rng = random.Random(seed)
        content = plain(rng, images=2, boxes=3)
        found = detections(content, seed)
        name = f"broken_{seed}"
        masks, keypoints = rng.random() < 0.4, rng.random() < 0.4
        try:
            registered(tmp_path, name, broken(content, rng))
            cfg = config(name, masks, keypoints)
            check_data_sets(cfg, training=True)
            dicts = load_dataset_dicts(cfg, [name])
            result = scores(name, found, rng.random() < 0.5)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, seed
            assert f"{name}.json" in str(error) or "MODEL." in str(error), str(error)
            outcomes["refused"] += 1
            continue
        finally:
            forget(name)
        outcomes["used"] += 1
        for metrics in result.values():
            assert all(value == -1 or 0 <= value <= 100 for value in metrics.values()), seed
        for entry in dicts:
            for row in entry["annotations"]:
                x, y, w, h = row["bbox"]
                assert row["iscrowd"] in (0, 1) and min(w, h) >= 0.99
                assert -0.5 <= x and x + w <= entry["width"] + 0.5
                assert -0.5 <= y and y + h <= entry["height"] + 0.5
                assert row["bbox_mode"] == BoxMode.XYWH_ABS
            made = instances_of(entry, masks=masks, keypoints=keypoints)
            assert len(made.gt_boxes) == len(made.gt_classes)
            assert not masks or len(made.gt_masks) == len(made)
            assert not keypoints or made.gt_keypoints.tensor.shape[1:] == (2, 3)
    assert min(outcomes.values()) >= 5, outcomes
