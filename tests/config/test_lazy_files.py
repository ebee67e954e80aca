"""LazyConfig files as configs: what is read from them, overrides, and what is refused."""

import kd_lazy
import pytest
import yaml

from projects.kd import ConfigError, load_config
from projects.kd.config import LazyNode, lazy_of

KD = """
kd = dict(
    heads=["CWD"], teacher=dict(config_file="beside.yaml", weights="beside.pth"), cwd=dict(weight=3)
)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazy")
    for name in ("beside.yaml", "beside.pth"):
        (folder / name).touch()
    return kd_lazy.write_training(folder, "fcos", "some_data", KD)


def test_the_keys_of_this_project_are_read_from_the_file(path):
    cfg = load_config(path)
    folder = path.removesuffix("/student.py")
    assert isinstance(cfg, LazyNode) and lazy_of(cfg) is cfg.lazy and cfg.path == path
    expected = {
        "MODEL": {"META_ARCHITECTURE": "FCOS", "DEVICE": "cpu", "WEIGHTS": "", "MASK_ON": False},
        "SOLVER": {"MAX_ITER": 6, "BASE_LR": 1e-3, "WEIGHT_DECAY": 0.1, "IMS_PER_BATCH": 2},
        "DATASETS": {"TRAIN": ("some_data",), "TEST": ("some_data",)},
        "INPUT": {"FORMAT": "RGB", "MIN_SIZE_TEST": 40, "MAX_SIZE_TEST": 56},
        "KD": {"META_ARCHITECTURE": "DistillMetaArch", "HEADS": ["CWD"]},
        "TEST": {"EVAL_PERIOD": 0},
    }
    for section, values in expected.items():
        assert {key: cfg[section][key] for key in values} == values | {
            key: tuple(x) for key, x in values.items() if isinstance(x, list)
        }
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (11, f"{folder}/student")
    assert cfg.MODEL.FCOS.NUM_CLASSES == 3 and cfg.SOLVER.CHECKPOINT_PERIOD == 2
    assert cfg.SOLVER.KEEP_CHECKPOINTS == 100 and cfg.SOLVER.GATHER_METRIC_PERIOD == 1
    assert cfg.KD.TEACHER.CONFIG_FILE == f"{folder}/beside.yaml"
    assert cfg.KD.TEACHER.WEIGHTS == f"{folder}/beside.pth"
    assert cfg.KD.CWD.WEIGHT == 3.0 and isinstance(cfg.KD.CWD.WEIGHT, float)


def test_overrides_in_both_forms_reach_the_file_and_the_keys(path):
    words = ["train.max_iter=9", "KD.CWD.TAU", "2.0", "kd.cwd.weight=7", "kd.heads=[PKD,CWD]"]
    words += ["SOLVER.BASE_LR", "0.5", "model.pixel_mean=[1,2,3]", "MODEL.WEIGHTS", "w=1.pth"]
    words += ["DATASETS.TRAIN", "('a','b')", "DATASETS.TEST", "('c',)", "SOLVER.EMA.DECAY", "0.5"]
    cfg = load_config(path, words)
    assert (cfg.SOLVER.MAX_ITER, cfg.lazy.train.max_iter) == (9, 9)
    assert (cfg.SOLVER.BASE_LR, cfg.lazy.optimizer.lr) == (0.5, 0.5)
    assert cfg.MODEL.PIXEL_MEAN == list(cfg.lazy.model.pixel_mean) == [1, 2, 3]
    assert cfg.MODEL.WEIGHTS == cfg.lazy.train.init_checkpoint == "w=1.pth"
    assert list(cfg.lazy.dataloader.train.dataset.names) == ["a", "b"]
    assert cfg.DATASETS.TRAIN == ("a", "b") and cfg.DATASETS.TEST == ("c",)
    assert cfg.lazy.dataloader.test.dataset.names == "c", "an evaluator takes one name"
    assert (cfg.KD.CWD.TAU, cfg.KD.CWD.WEIGHT, tuple(cfg.KD.HEADS)) == (2.0, 7.0, ("PKD", "CWD"))
    assert cfg.SOLVER.EMA.DECAY == 0.5


def test_heads_are_what_makes_a_run_distil(path, tmp_path):
    plain = kd_lazy.write_training(tmp_path, "fcos", "some_data")
    assert load_config(plain).KD.META_ARCHITECTURE == ""
    assert load_config(plain, ["kd.heads=[PKD]"]).KD.META_ARCHITECTURE == "DistillMetaArch"
    assert load_config(path, ["KD.META_ARCHITECTURE", ""]).KD.META_ARCHITECTURE == ""


def test_keys_that_were_set_since_stay_when_others_are_overridden(path):
    from projects.kd.config import merge_overrides

    cfg = load_config(path)
    cfg.OUTPUT_DIR = "elsewhere"
    merge_overrides(cfg, ["train.max_iter=3"])
    assert (cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) == ("elsewhere", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trains.max_iter=3"], r"student\.py has no 'trains'; .*did you mean train"),
        (["model.backbon.out_channels=3"], r"has no 'model\.backbon'"),
        (["MODEL.FPN.OUT_CHANNELS", "8"], r"MODEL\.FPN\.OUT_CHANNELS has no effect.*PLACE=VALUE"),
        (["INPUT.MIN_SIZE_TRAIN", "(8,)"], r"INPUT\.MIN_SIZE_TRAIN has no effect"),
        (["train.max_iter"], r"train\.max_iter has no value: write train\.max_iter=VALUE"),
        (["train.max_iter=[1"], r"train\.max_iter=\[1: "),
        (["kd.cwd.weights=3"], r"KD\.CWD\.WEIGHTS; did you mean .*WEIGHT"),
        (["kd.cwd=3"], r"KD\.CWD is a group"),
    ],
)
def test_overrides_without_effect_are_refused(path, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = (", r"cannot be read as a LazyConfig \(SyntaxError"),
        ("import no_such_module", r"ModuleNotFoundError.*no_such_module"),
        ("train = dict()", r"needs a model"),
        ("{model}kd = dict(headz=['CWD'])", r"unknown key KD\.HEADZ; did you mean KD\.HEADS"),
        ("{model}kd = dict(cwd=dict(weight=1.0), CWD=dict())", r"kd\.CWD stands twice"),
        ("{model}kd = dict(cwd=4)", r"KD\.CWD is 4, but it is a group"),
    ],
)
def test_files_with_mistakes_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.py"
    model = "import torch\nfrom detectron2.config import LazyCall as L\n"
    model += "model = L(torch.nn.Identity)()\n"
    file.write_text(text.replace("{model}", model))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(file))
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


def test_values_are_checked_under_their_place_in_the_file(path):
    from projects.kd.config.key_checks import check_values

    with pytest.raises(ConfigError, match=r"^train\.max_iter \(SOLVER\.MAX_ITER\) is -2, it must"):
        check_values(load_config(path, ["train.max_iter=-2"]))


def test_settings_that_nothing_reads_are_said(tmp_path, caplog):
    file = kd_lazy.write_model(tmp_path, "fcos", "train = dict(clip_grad=1, max_iter=3)\n")
    load_config(file, ["train.patience=2"])
    assert "without effect, nothing here reads it: train.clip_grad, train.patience" in caplog.text


def test_a_record_of_all_settings_is_the_same_for_the_same_file(path):
    cfg = load_config(path)
    text = cfg.dump()
    assert text == load_config(path).dump() == cfg.clone().dump()
    record = yaml.safe_load(text)
    assert record["KD"]["CWD"]["WEIGHT"] == 3.0 and record["SOLVER"]["MAX_ITER"] == 6
    assert record["model"]["head"]["conv_dims"] == [8]
    assert "max_iter" not in record["train"], "it stands under SOLVER.MAX_ITER"
    changed = load_config(path, ["model.head.conv_dims=[8,8]"]).dump()
    assert yaml.safe_load(changed)["model"]["head"]["conv_dims"] == [8, 8] and changed != text


def test_a_clone_has_parts_of_its_own(path):
    cfg = load_config(path)
    other = cfg.clone()
    other.lazy.train.max_iter = 1
    assert isinstance(other, LazyNode) and cfg.lazy.train.max_iter == 6


def test_the_folder_that_every_file_inherits_is_the_configs_own(tmp_path):
    file = tmp_path / "configs" / "mine"
    file.mkdir(parents=True)
    text = "train = dict(output_dir='./output')\n"
    assert load_config(kd_lazy.write_model(file, "fcos", text)).OUTPUT_DIR == "output/mine/fcos"


def test_the_example():
    cfg = load_config("configs/shapes/fcos_lazy_student.py")
    assert cfg.KD.TEACHER.CONFIG_FILE.endswith("configs/shapes/fcos_teacher.yaml")
    yaml_student = load_config("configs/shapes/fcos_student.yaml")
    for section, key in (("SOLVER", "BASE_LR"), ("SOLVER", "MAX_ITER"), ("INPUT", "MIN_SIZE_TEST")):
        assert cfg[section][key] == yaml_student[section][key]
    assert cfg.DATASETS.TRAIN == yaml_student.DATASETS.TRAIN


def test_rows_of_a_suite_take_both_forms(path, tmp_path):
    from projects.kd.analysis.suite_file import flat_opts
    from projects.kd.analysis.suites import Run

    words = ["train.max_iter=3", "SEED", 5, ["model.head.conv_dims=[8,8]", "KD.CWD.WEIGHT", 2.0]]
    row = {"name": "lazy", "config": path, "opts": flat_opts(words)}
    assert row["opts"] == [*words[:3], *words[3]]
    run = Run(row, 7, {}, str(tmp_path), ["OUTPUT_DIR", "here"])
    assert (run.cfg.SOLVER.MAX_ITER, run.cfg.SEED, run.cfg.OUTPUT_DIR) == (3, 7, "here")
    other = Run({**row, "opts": flat_opts(words[:3])}, 7, {}, str(tmp_path), [])
    assert run.stamp() != other.stamp() and other.stamp() == other.stamp()


def test_a_recipe_from_two_lazy_configs(path, tmp_path):
    from projects.kd.recipes.one_flag import recipe_config

    plain = kd_lazy.write_training(tmp_path, "fcos", "some_data")
    teacher = kd_lazy.write_model(tmp_path, "vitdet")
    words = ["kd.pkd.weight=2", "SOLVER.MAX_ITER", "3"]
    cfg, lines, weights = recipe_config(plain, teacher, "", words, "some.pth")
    assert tuple(cfg.KD.HEADS) == ("PKD",) and cfg.KD.META_ARCHITECTURE == "DistillMetaArch"
    assert (cfg.KD.PKD.WEIGHT, cfg.SOLVER.MAX_ITER, weights) == (2.0, 3, "some.pth")
    assert cfg.OUTPUT_DIR == f"{tmp_path}/student_from_vitdet_PKD"
    assert "two-stage teacher (GeneralizedRCNN)" in lines[0] and "on p3, p4, p5" in lines[0]
    with pytest.raises(ConfigError, match="distils already"):
        recipe_config(path, teacher, "")


def test_the_record_of_a_run_is_no_config(path, tmp_path):
    (tmp_path / "config.yaml").write_text(load_config(path).dump())
    with pytest.raises(ConfigError, match="record of a run of a LazyConfig; give its .py file"):
        load_config(str(tmp_path / "config.yaml"))
