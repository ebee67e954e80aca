"""KD.TEACHER.CLASS_MAP: which class is which, and what is refused in one line."""

from __future__ import annotations

import logging

import pytest
from detectron2.data import MetadataCatalog

from projects.kd.config import add_kd_config, get_cfg, load_config
from projects.kd.config.key_checks import check_each
from projects.kd.data.class_map import read_class_map
from projects.kd.errors import ConfigError

ANIMALS = ["ant", "bee", "cat", "dog"]
DATA = "class_map_animals"


@pytest.fixture(autouse=True)
def animals():
    MetadataCatalog.get(DATA).set(thing_classes=ANIMALS, stuff_classes=["sky", "sea"])
    yield
    MetadataCatalog.pop(DATA)


def make_cfg(entries, data=(DATA,), arch="RetinaNet", number=4):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.RETINANET.NUM_CLASSES = number
    cfg.DATASETS.TRAIN = tuple(data)
    cfg.KD.TEACHER.CLASS_MAP = entries
    return cfg


def read(entries, theirs=(), number=None, kind="thing_classes", **options):
    names = {kind: list(theirs)} if theirs else {}
    found = read_class_map(make_cfg(entries, **options), names, {kind: number or len(theirs)})
    return found.chosen[kind], found.shared[kind].known, found.names[kind]


def test_an_empty_map_says_nothing():
    found = read_class_map(make_cfg([]), {}, {"thing_classes": 3})
    assert (found.chosen, found.shared, found.names) == ({}, {}, {})


@pytest.mark.parametrize(
    ("theirs", "chosen", "known"),
    [
        (ANIMALS, [0, 1, 2, 3], None),
        (ANIMALS[::-1], [3, 2, 1, 0], None),
        (["elk", "dog", "bee", "ant", "fox", "cat"], [3, 2, 5, 1], None),  # superset
        (["dog", "bee"], [1, 0], (1, 3)),  # subset
        (["fox", "cat", "elk", "ant"], [3, 1], (0, 2)),  # overlap
    ],
)
def test_names_are_matched_whatever_their_order(theirs, chosen, known):
    names = ANIMALS if known is None else [ANIMALS[k] for k in known]
    assert read(["by_name"], theirs) == (chosen, known, names)


@pytest.mark.parametrize(
    ("entries", "known"),
    [
        ([["cat", "tiger"], ["ant", "pismire"]], (0, 2)),
        ([[2, 1], [0, 2]], (0, 2)),
        ([["cat", 1], [0, "pismire"]], (0, 2)),
    ],
)
def test_pairs_of_names_and_of_numbers_are_the_same(entries, known):
    assert read(entries, ["wolf", "tiger", "pismire"]) == ([2, 1], known, ["ant", "cat"])


def test_numbers_need_no_names():
    entries = [[1, 79], [0, 3], [2, 0]]
    assert read(entries, number=80, data=()) == ([3, 79, 0], (0, 1, 2), [])


def test_pairs_are_of_the_kind_that_the_student_predicts():
    cfg = make_cfg([["sea", "water"]], arch="SemanticSegmentor")
    names = {"stuff_classes": ["land", "water"], "thing_classes": ["ant"]}
    found = read_class_map(cfg, names, {"stuff_classes": 2, "thing_classes": 1})
    assert found.chosen == {"stuff_classes": [1]} and found.shared["stuff_classes"].known == (1,)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.KD.TEACHER.CLASS_MAP = ["by_name"]
    names["stuff_classes"] = ["sea", "land", "sky"]
    found = read_class_map(cfg, names, {"stuff_classes": 3, "thing_classes": 1})
    assert found.chosen == {"thing_classes": [0], "stuff_classes": [2, 0]}


def test_what_is_left_out_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="projects.kd.data.class_map"):
        read(["by_name"], ["dog", "elk", "bee"])
    first, second = (x.getMessage() for x in caplog.records)
    assert "2 of the student's 4 classes" in first and "bee = bee, dog = dog" in first
    assert "1 of the teacher's are left out" in first
    assert "no classes ant, cat" in second


@pytest.mark.parametrize(
    ("entries", "theirs", "words"),
    [
        (["by_name"], ["elk", "fox"], "no class has the same name.*ant, bee, cat, dog.*elk, fox"),
        (["by_name"], (), "the teacher's class names are not known"),
        ([["cat", "lion"]], ["tiger", "lynx"], "teacher has no class 'lion'.*it has tiger, lynx"),
        ([["cta", "lion"]], ["lion"], "student has no class 'cta'; did you mean cat?"),
        ([["cat", "lion"]], (), "'lion': the teacher's class names are not known"),
        ([[4, 0]], ["lion"], "student has no class 4; it has 0 to 3"),
        ([[0, 1]], ["lion"], "teacher has no class 1; it has 0 to 0"),
        ([[0, 0], [0, 1]], ["a", "b"], "takes 0 of the student a second time"),
        ([["cat", "b"], ["dog", "b"]], ["a", "b"], "takes b of the teacher a second time"),
    ],
)
def test_wrong_maps_are_one_line(entries, theirs, words):
    with pytest.raises(ConfigError, match=words) as caught:
        read(entries, theirs, number=len(theirs) or 3)
    message = str(caught.value)
    assert message.startswith("KD.TEACHER.CLASS_MAP") and "\n" not in message


def test_a_teacher_without_such_classes_and_names_of_other_number_are_refused():
    with pytest.raises(ConfigError, match="predicts none of the student's kinds of classes"):
        read_class_map(make_cfg(["by_name"]), {}, {"stuff_classes": 4})
    with pytest.raises(ConfigError, match="predicts 3 classes and its DATASETS.TRAIN has 2"):
        read(["by_name"], ["ant", "bee"], number=3)


def test_the_key_takes_by_name_and_pairs(tmp_path):
    path = tmp_path / "student.yaml"
    path.write_text("KD: {TEACHER: {CLASS_MAP: by_name}}\n")
    assert load_config(str(path)).KD.TEACHER.CLASS_MAP == ["by_name"]
    path.write_text("KD: {TEACHER: {CLASS_MAP: [[cat, 3], [0, ant]]}}\n")
    cfg = load_config(str(path))
    assert cfg.KD.TEACHER.CLASS_MAP == [["cat", 3], [0, "ant"]]
    check_each(cfg, ("KD",))
    cfg = load_config(str(path), ["KD.TEACHER.CLASS_MAP", "by_name"])
    check_each(cfg, ("KD",))
    assert cfg.KD.TEACHER.CLASS_MAP == ["by_name"]
    for wrong in (["by_index"], [["cat"]], [[-1, 0]], [[True, 0]]):
        cfg.KD.TEACHER.CLASS_MAP = wrong
        with pytest.raises(ConfigError, match="CLASS_MAP is .*, it must be .*, or by_name"):
            check_each(cfg, ("KD",))
