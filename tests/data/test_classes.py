"""Class identity by name: data sets among each other, and the teacher's against the student's."""

import json
import logging
import random

import kd_models
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from projects.kd.config import add_kd_config, get_cfg
from projects.kd.data import classes, register
from projects.kd.data.classes import check_class_names, compare_with_teacher
from projects.kd.data.register import names_by_kind, register_configured
from projects.kd.distiller import DistillMetaArch
from projects.kd.errors import ConfigError

ANIMALS = ["ant", "bee", "cat", "dog"]


def write_data(path, names, ids=None, keypoints=()):
    """One image with a box for each class, wide as its place in ANIMALS says."""
    ids = ids or range(1, len(names) + 1)
    by_name = dict(zip(names, ids, strict=True))
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 90, "height": 60}],
        "categories": [
            {"id": i, "name": name, **({"keypoints": list(keypoints)} if keypoints else {})}
            for name, i in by_name.items()
        ],
        "annotations": [
            {
                "id": 1 + n,
                "image_id": 7,
                "category_id": by_name[name],
                "bbox": [1, 1, 10 * (n + 1), 20],
                "area": 200 * (n + 1),
                "iscrowd": 0,
            }
            for n, name in enumerate(sorted(names))
        ],
    }
    path.write_text(json.dumps(content))
    (path.parent / "a.png").write_bytes(b"no matter")
    return str(path)


def make_cfg(sets, train, test=(), folder="."):
    """A config that registers ``{name: json file}``."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.KD.DATASETS = [[name, path, str(folder)] for name, path in sets.items()]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    return cfg


@pytest.fixture
def name(request):
    """A prefix for names; what was registered under it is forgotten."""
    prefix = f"classes_{abs(hash(request.node.name))}"
    yield prefix
    for known in [x for x in register._configured if x.startswith(prefix)]:
        del register._configured[known]
        DatasetCatalog.pop(known, None)
        MetadataCatalog.pop(known, None)


def named_widths(dataset):
    names = MetadataCatalog.get(dataset).thing_classes
    (entry,) = DatasetCatalog.get(dataset)
    return {names[a["category_id"]]: a["bbox"][2] for a in entry["annotations"]}


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_are_mapped_to_that_of_the_first_training_set(tmp_path, name, seed):
    rng = random.Random(seed)
    names = [chr(97 + i) for i in range(rng.randint(1, 12))]
    rng.shuffle(names)
    sets = {f"{name}_first": write_data(tmp_path / "first.json", names)}
    for split in ("second", "val"):
        own = rng.sample(names, len(names))
        ids = rng.sample(range(100), len(names))
        sets[f"{name}_{split}"] = write_data(tmp_path / f"{split}.json", own, ids)
    cfg = make_cfg(sets, list(sets)[:2], list(sets)[2:], tmp_path)
    register_configured(cfg)
    check_class_names(cfg, training=True)
    widths = named_widths(f"{name}_first")
    for split in sets:
        assert MetadataCatalog.get(split).thing_classes == names
        assert named_widths(split) == widths
    (entry,) = DatasetCatalog.get(f"{name}_val")
    (first,) = DatasetCatalog.get(f"{name}_first")
    assert [a["category_id"] for a in entry["annotations"]] == [
        a["category_id"] for a in first["annotations"]
    ]


def test_a_mapped_order_is_said_and_follows_the_config(tmp_path, name, caplog):
    sets = {
        f"{name}_a": write_data(tmp_path / "a.json", ANIMALS),
        f"{name}_b": write_data(tmp_path / "b.json", ANIMALS[::-1]),
    }
    with caplog.at_level(logging.WARNING, logger=register.__name__):
        register_configured(make_cfg(sets, [f"{name}_a"], [f"{name}_b"], tmp_path))
        register_configured(make_cfg(sets, [f"{name}_a"], [f"{name}_b"], tmp_path))
    (record,) = caplog.records
    assert "b.json" in record.getMessage() and "matched by name" in record.getMessage()
    assert MetadataCatalog.get(f"{name}_b").thing_classes == ANIMALS
    register_configured(make_cfg(sets, [f"{name}_b"], [f"{name}_a"], tmp_path))
    for split in sets:
        assert MetadataCatalog.get(split).thing_classes == ANIMALS[::-1]
        assert named_widths(split) == {x: 10.0 * (i + 1) for i, x in enumerate(ANIMALS)}
    cfg = make_cfg(sets, [f"{name}_b"], [], tmp_path)
    register_configured(cfg, class_order=["dog", "ant", "bee", "cat"])  # a teacher's
    assert MetadataCatalog.get(f"{name}_b").thing_classes == ["dog", "ant", "bee", "cat"]


@pytest.mark.parametrize("kind", ["train", "test"])
def test_other_names_are_refused_with_both(tmp_path, name, caplog, kind):
    sets = {
        f"{name}_a": write_data(tmp_path / "a.json", ANIMALS),
        f"{name}_b": write_data(tmp_path / "b.json", ["ant", "bee", "cat", "Dog"]),
    }
    train = list(sets) if kind == "train" else [f"{name}_a"]
    cfg = make_cfg(sets, train, [f"{name}_b"], tmp_path)
    register_configured(cfg)
    key = f"DATASETS.{kind.upper()}"
    with pytest.raises(ConfigError, match=f"^{key}: data set '{name}_b'") as error:
        check_class_names(cfg, training=True)
    assert f"only '{name}_b' has Dog, only '{name}_a' has dog" in str(error.value)
    with caplog.at_level(logging.WARNING, logger=classes.__name__):
        check_class_names(cfg, training=False)  # weights may come from elsewhere
    assert "only" in caplog.text


def test_an_order_that_cannot_be_mapped_is_refused(tmp_path, name):
    sets = {f"{name}_a": write_data(tmp_path / "a.json", ANIMALS)}
    other = f"{name}_other"
    DatasetCatalog.register(other, lambda: [])
    MetadataCatalog.get(other).thing_classes = ANIMALS[::-1]
    try:
        cfg = make_cfg(sets, [f"{name}_a"], [other], tmp_path)
        register_configured(cfg)
        for training in (True, False):
            with pytest.raises(ConfigError, match="the order differs, .*dog, cat.*ant, bee"):
                check_class_names(cfg, training)
        cfg = make_cfg(sets, [other], [f"{name}_a"], tmp_path)  # this way it can be
        register_configured(cfg)
        check_class_names(cfg, training=True)
    finally:
        DatasetCatalog.remove(other)
        MetadataCatalog.remove(other)


def test_keypoints_and_pixel_classes_have_one_order_too(tmp_path, name):
    sets = {
        f"{name}_a": write_data(tmp_path / "a.json", ANIMALS, keypoints=["nose", "tail"]),
        f"{name}_b": write_data(tmp_path / "b.json", ANIMALS, keypoints=["tail", "nose"]),
    }
    cfg = make_cfg(sets, [f"{name}_a"], [f"{name}_b"], tmp_path)
    register_configured(cfg)
    check_class_names(cfg, training=True)
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ConfigError, match="other keypoints than .*the order differs"):
        check_class_names(cfg, training=True)
    cfg = make_cfg({}, [f"{name}_x"], [f"{name}_y"])
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    for split, names in (("x", ["sky", "road"]), ("y", ["road", "sky"])):
        DatasetCatalog.register(f"{name}_{split}", lambda: [])
        MetadataCatalog.get(f"{name}_{split}").stuff_classes = names
    try:
        with pytest.raises(ConfigError, match="other classes of pixels than"):
            check_class_names(cfg, training=True)
    finally:
        for split in "xy":
            DatasetCatalog.remove(f"{name}_{split}")
            MetadataCatalog.remove(f"{name}_{split}")


def test_names_come_from_the_config_that_names_the_data_set(tmp_path, name):
    mine = make_cfg({f"{name}_a": write_data(tmp_path / "a.json", ANIMALS)}, [f"{name}_a"])
    teachers = make_cfg({f"{name}_a": write_data(tmp_path / "t.json", ANIMALS[::-1])}, ())
    register_configured(mine)
    assert names_by_kind([], f"{name}_a") == {"thing_classes": ANIMALS}
    assert names_by_kind([teachers, mine], f"{name}_a") == {"thing_classes": ANIMALS[::-1]}
    assert names_by_kind([teachers, mine], "nowhere") == {}
    labels = make_cfg({}, ())
    labels.KD.SEM_SEG_DATASETS = [["maps", "images", "labels", ["sky", "road"]]]
    assert names_by_kind([labels], "maps") == {"stuff_classes": ["sky", "road"]}


@pytest.fixture
def pair(tmp_path, name):
    """Config of a student of three classes, and a function that gives the teacher's classes."""
    teacher_cfg = kd_models.tiny_cfg()
    files = kd_models.write_teacher(tmp_path, teacher_cfg)
    own = write_data(tmp_path / "own.json", ANIMALS[:3])

    def make(heads, taught, there=True):
        teacher_cfg.KD.DATASETS = [["theirs", str(tmp_path / "theirs.json"), str(tmp_path)]]
        teacher_cfg.DATASETS.TRAIN = ("theirs",)
        (tmp_path / "theirs.json").unlink(missing_ok=True)
        if there:
            write_data(tmp_path / "theirs.json", taught)
        kd_models.write_config(teacher_cfg, tmp_path / "teacher.yaml")
        cfg = kd_models.distill_cfg(files, heads=heads)
        cfg.KD.DATASETS = [[f"{name}_own", own, str(tmp_path)]]
        cfg.DATASETS.TRAIN = (f"{name}_own",)
        register_configured(cfg)
        return cfg

    return make


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("OutputKD", {}),
        ("CWD", {"KD.CWD.TARGET": "dense"}),
        ("PI", {"KD.PI.TARGET": "dense"}),
        ("CSA", {"KD.CSA.HEAD": "teacher", "KD.CSA.DIM": 16}),
    ],
)
def test_heads_on_class_outputs_never_compare_other_classes(pair, head, options):
    changes = [part for item in options.items() for part in item]
    cfg = pair((head,), ANIMALS[:3])
    cfg.merge_from_list(changes)
    DistillMetaArch.from_config(cfg)
    for taught in (["bee", "ant", "cat"], ["ant", "bee", "Cat"], ["ant", "bee"]):
        cfg = pair((head,), taught)
        cfg.merge_from_list(changes)
        with pytest.raises(ConfigError, match=f"^KD.HEADS: {head} compares classes") as error:
            DistillMetaArch.from_config(cfg)
        assert "KD.TEACHER.OPTS" in str(error.value) and "\n" not in str(error.value)
    cfg.KD.TEACHER.OPTS = ["DATASETS.TRAIN", "()"]
    DistillMetaArch.from_config(cfg)  # said to mean the same


@pytest.mark.parametrize(
    ("head", "options"),
    [("Mimic", {}), ("CWD", {}), ("AT", {"KD.AT.TARGET": "dense"}), ("CSA", {"KD.CSA.DIM": 16})],
)
def test_other_heads_are_told(pair, caplog, head, options):
    cfg = pair((head,), ["bee", "ant", "cat"])
    cfg.merge_from_list([part for item in options.items() for part in item])
    with caplog.at_level(logging.WARNING, logger=classes.__name__):
        DistillMetaArch.from_config(cfg)
    (record,) = caplog.records
    line = record.getMessage()
    assert "the order differs, teacher has bee, ant, cat, student has ant, bee, cat" in line
    assert "INIT_FROM_TEACHER" not in line
    cfg.KD.INIT_FROM_TEACHER = ("head.",)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=classes.__name__):
        compare_with_teacher(cfg, {"thing_classes": ["bee", "ant", "cat"]}, {})
    assert "INIT_FROM_TEACHER" in caplog.text


def test_a_teacher_whose_data_are_not_here(pair, caplog):
    cfg = pair(("OutputKD",), [], there=False)
    with caplog.at_level(logging.WARNING):
        DistillMetaArch.from_config(cfg)
    assert "the teacher's classes are not known: KD.DATASETS: 'theirs'" in caplog.text
    assert "OutputKD: the classes of the teacher are not known" in caplog.text
