"""The one-flag recipes: which values they choose, for whom, and what wins over them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import kd_models
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from projects.kd import build_training_model, check_config, load_config
from projects.kd.config import merge_config
from projects.kd.config.config_files import read_yaml
from projects.kd.errors import ConfigError
from projects.kd.heads.base import IMITATION_HEAD_REGISTRY, ImitationHead
from projects.kd.recipes.methods import method_file, method_files, method_names, source_of
from projects.kd.recipes.one_flag import (
    BY_TEACHER,
    DEFAULT_METHOD,
    DEFAULT_METHODS,
    apply_recipe,
)

ROOT = Path(__file__).resolve().parents[2]
ZOO = "model_zoo://COCO-Detection/"
RETINA_STUDENT, RETINA_TEACHER = (
    f"{ZOO}retinanet_R_50_FPN_1x.yaml",
    f"{ZOO}retinanet_R_101_FPN_3x.yaml",
)
RCNN_STUDENT, RCNN_TEACHER = (
    f"{ZOO}faster_rcnn_R_50_FPN_1x.yaml",
    f"{ZOO}faster_rcnn_R_101_FPN_3x.yaml",
)


def recipe(student=RETINA_STUDENT, teacher=RETINA_TEACHER, method="", opts=(), **flags):
    values = {"teacher_weights": "", "eval_only": False, **flags}
    return apply_recipe(
        SimpleNamespace(
            config_file=student, teacher=teacher, method=method, opts=list(opts), **values
        )
    )


ONE_STAGE_LEVELS, TWO_STAGE_LEVELS = ("p3", "p4", "p5", "p6"), ("p2", "p3", "p4", "p5")


@pytest.mark.parametrize(
    ("student", "teacher", "method", "head", "weight", "levels"),
    [
        (RETINA_STUDENT, RETINA_TEACHER, "", "PKD", 10.0, ONE_STAGE_LEVELS),
        (RETINA_STUDENT, RETINA_TEACHER, "cwd", "CWD", 5.0, ONE_STAGE_LEVELS),
        (RETINA_STUDENT, RETINA_TEACHER, "FGFI", "FGFI", 0.01, ()),
        (RETINA_STUDENT, RETINA_TEACHER, "mimic", "Mimic", 1.0, ()),
        (RETINA_STUDENT, RETINA_TEACHER, "icd", "ICD", 8.0, ()),
        (RETINA_STUDENT, RETINA_TEACHER, "sdf", "SDF", -1.0, ()),
        (RCNN_STUDENT, RCNN_TEACHER, "icd", "ICD", 3.0, ()),
        (RCNN_STUDENT, RCNN_TEACHER, "", "CWD", 10.0, TWO_STAGE_LEVELS),
        (RCNN_STUDENT, RCNN_TEACHER, "PKD", "PKD", 6.0, TWO_STAGE_LEVELS),
        (RCNN_STUDENT, RCNN_TEACHER, "CWD", "CWD", 10.0, TWO_STAGE_LEVELS),
        (RCNN_STUDENT, RCNN_TEACHER, "fgfi", "FGFI", 0.01, ()),
        # PKD's weight goes by the teacher, CWD's by the student; p6 means different things
        (RETINA_STUDENT, RCNN_TEACHER, "PKD", "PKD", 6.0, ("p3", "p4", "p5")),
        (RETINA_STUDENT, RCNN_TEACHER, "CWD", "CWD", 5.0, ("p3", "p4", "p5")),
    ],
)
def test_values_by_method_and_family(student, teacher, method, head, weight, levels, capsys):
    cfg = recipe(student, teacher, method)
    assert cfg.KD.META_ARCHITECTURE == "DistillMetaArch"
    assert cfg.KD.HEADS == (head,)
    assert cfg.KD.TEACHER.CONFIG_FILE == teacher
    node = cfg.KD[head.upper()]
    assert (node.WEIGHT, tuple(node.LEVELS)) == (weight, levels)
    assert node.START_ITER == (400 if head == "FGFI" else -2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe:")]
    assert len(said) == 1
    assert f"recipe: {head} for a " in said[0]
    wanted = "PRESET balanced" if weight < 0 else f"WEIGHT {weight:g}"
    assert f"KD.{head.upper()}.{wanted} on " in said[0]
    assert ("the default" in said[0]) == (method == "")


@pytest.mark.parametrize("method", ["fgfi", "cwd", "pkd", "icd", "sdf_csa"])
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_equals_the_coco_config(method, detector):
    """One flag gives what the written-out config of the same pair says."""
    name = f"{detector}_R50_FPN_from_R101_{method}_1x.yaml"
    written = load_config(str(ROOT / "configs" / "COCO-Detection" / name))
    cfg = recipe(f"{ZOO}{detector}_R_50_FPN_1x.yaml", f"{ZOO}{detector}_R_101_FPN_3x.yaml", method)
    assert cfg.KD == written.KD
    assert cfg.SOLVER == written.SOLVER


def test_the_students_own_config_stays():
    plain, cfg = load_config(RETINA_STUDENT), recipe()
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "TEST"):
        assert cfg[key] == plain[key]
    name = "retinanet_R_50_FPN_1x_from_retinanet_R_101_FPN_3x_PKD"
    assert cfg.OUTPUT_DIR == f"output/COCO-Detection/{name}"


def test_the_config_builds_and_passes_the_checks():
    shapes = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    opts = ["MODEL.RETINANET.NUM_CLASSES", 6, *shapes]
    cfg = recipe(method="CWD,FGFI", opts=opts)
    check_config(cfg)
    cfg.MODEL.DEVICE = "meta"
    cfg.KD.TEACHER.OPTS, cfg.KD.TEACHER.ALLOW_MISSING = ["MODEL.WEIGHTS", ""], True
    with torch.device("meta"):
        model = build_training_model(cfg)
    assert list(model.heads) == ["CWD", "FGFI"]
    assert model.heads["CWD"].levels == ONE_STAGE_LEVELS
    assert model.heads["FGFI"].levels == ("p3", "p4", "p5", "p6", "p7")


def test_command_line_values_win(capsys):
    cfg = recipe(opts=["KD.PKD.WEIGHT", "3.0", "KD.PKD.START_ITER", "50", "OUTPUT_DIR", "mine"])
    assert (cfg.KD.PKD.WEIGHT, cfg.KD.PKD.START_ITER, cfg.OUTPUT_DIR) == (3.0, 50, "mine")
    assert cfg.KD.PKD.LEVELS == ONE_STAGE_LEVELS
    assert "KD.PKD.WEIGHT 3 on" in capsys.readouterr().out
    cfg = recipe(opts=["KD.LEVELS", "('p4', 'p5')"])
    assert (cfg.KD.LEVELS, cfg.KD.PKD.LEVELS) == (("p4", "p5"), ())
    assert "on p4, p5" in capsys.readouterr().out
    cfg = recipe(opts=["KD.PKD.LEVELS", "('p7',)"])
    assert cfg.KD.PKD.LEVELS == ("p7",)


METHOD_FILES = method_files()


@pytest.mark.parametrize("key", METHOD_FILES, ids=lambda key: "_".join(key))
def test_method_files_hold_one_method_and_its_source(key):
    path = METHOD_FILES[key]
    raw = read_yaml(path)
    cfg = kd_models.tiny_cfg()
    before = cfg.clone()
    merge_config(cfg, raw, path)
    assert cfg.KD.HEADS
    assert cfg.KD.META_ARCHITECTURE == "DistillMetaArch"
    for head in cfg.KD.HEADS:
        assert head in IMITATION_HEAD_REGISTRY
    own = {head.upper() for head in cfg.KD.HEADS} | {"HEADS", "META_ARCHITECTURE", "ADAPTER"}
    own |= {"INIT_FROM_TEACHER"}
    assert set(raw.KD) <= own, "a method sets nothing of another's"
    for name in before:
        assert cfg[name] == before[name] or name in ("KD", "SOLVER")
    assert len(source_of(path)) > 10


def test_methods_are_found_by_names_of_heads_and_of_files():
    heads = ["CWD", "OutputKD", "MyHead"]
    assert method_names("outputkd, Output_KD,cwd_masks", heads) == (
        "OutputKD",
        "OutputKD",
        "cwd_masks",
    )
    assert method_names("myhead", heads) == ("MyHead",)
    assert method_file("OutputKD", "two-stage") == method_file("output_kd", "one-stage")
    assert method_file("CWD", "one-stage") != method_file("CWD", "two-stage")
    assert method_file("CWD", "other") is None
    assert method_file("MyHead", "one-stage") is None
    names = {name.lower() for name in method_names(",".join((DEFAULT_METHOD[0], *BY_TEACHER)), [])}
    assert names <= {method for method, _ in METHOD_FILES}
    assert all(method_file(name, family) for family, (name, _) in DEFAULT_METHODS.items())


def test_a_method_without_values_for_the_detector(capsys):
    with pytest.raises(
        ConfigError, match="--method: cwd_masks has no values for a one-stage .*two-st"
    ):
        recipe(method="cwd_masks")
    cfg = recipe(RCNN_STUDENT, RCNN_TEACHER, "cwd_masks,pkd")
    assert (cfg.KD.HEADS, cfg.KD.CWD.TARGET, cfg.KD.CWD.WEIGHT) == (("CWD", "PKD"), "masks", 1.0)
    assert "recipe: cwd_masks for a two-stage student" in capsys.readouterr().out


def test_lazy_teacher_and_teacher_weights():
    fcos = f"{ZOO}fcos_R_50_FPN_1x.py"
    cfg = recipe(teacher=fcos, teacher_weights="fcos.pth", method="CWD")
    assert cfg.KD.TEACHER.WEIGHTS == "fcos.pth"
    assert (cfg.KD.CWD.WEIGHT, cfg.KD.CWD.LEVELS) == (5.0, ONE_STAGE_LEVELS)
    with pytest.raises(ConfigError, match="--teacher-weights: .*where its training starts"):
        recipe(teacher=fcos)
    assert recipe(teacher=fcos, eval_only=True).KD.HEADS == ("PKD",)
    cfg = recipe(teacher=fcos, opts=["KD.TEACHER.WEIGHTS", "other.pth"])
    assert cfg.KD.TEACHER.WEIGHTS == "other.pth"


def test_own_teacher_config(tmp_path):
    config, weights = kd_models.write_teacher(tmp_path)
    student = kd_models.write_config(kd_models.tiny_cfg(), tmp_path / "student.yaml")
    with pytest.raises(ConfigError, match="--teacher-weights: .*teacher.yaml' has none"):
        recipe(student, config)
    cfg = recipe(student, config, teacher_weights=weights)
    assert cfg.OUTPUT_DIR == "output/student_from_teacher_PKD"
    losses = kd_models.losses_at(kd_models.build_wrapper(cfg), kd_models.make_batch())
    assert any(key.startswith("loss_kd_pkd") for key in losses)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_run_has_a_folder_of_its_own_and_finds_the_trained_teacher(tmp_path, capsys):
    config, weights = kd_models.write_teacher(tmp_path)
    teacher = load_config(config)
    teacher.OUTPUT_DIR = str(tmp_path / "runs" / "teacher")
    config = kd_models.write_config(teacher, tmp_path / "trained.yaml")
    plain = kd_models.tiny_cfg(OUTPUT_DIR=str(tmp_path / "runs" / "plain"))
    student = kd_models.write_config(plain, tmp_path / "student.yaml")
    with pytest.raises(ConfigError, match="has none, and its OUTPUT_DIR no model_final.pth"):
        recipe(student, config)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    trained = tmp_path / "runs" / "teacher" / "model_final.pth"
    Path(weights).rename(trained)
    cfg = recipe(student, config)
    assert cfg.OUTPUT_DIR == str(tmp_path / "runs" / "student_from_trained_PKD")
    assert cfg.KD.TEACHER.WEIGHTS == str(trained)
    assert f"teacher's weights from its own run: {trained}" in capsys.readouterr().out
    kd_models.build_wrapper(cfg)
    cfg = recipe(student, config, teacher_weights="other.pth", opts=["OUTPUT_DIR", "mine"])
    assert (cfg.KD.TEACHER.WEIGHTS, cfg.OUTPUT_DIR) == ("other.pth", "mine")


def test_config_yaml_goes_by_its_folder(tmp_path):
    run = tmp_path / "big_teacher"
    run.mkdir()
    _, weights = kd_models.write_teacher(run)
    config = kd_models.write_config(kd_models.tiny_cfg(), run / "config.yaml")
    cfg = recipe(teacher=config, teacher_weights=weights)
    assert cfg.OUTPUT_DIR == "output/COCO-Detection/retinanet_R_50_FPN_1x_from_big_teacher_PKD"


def test_timm_student_is_outlined_without_its_weights(tmp_path):
    """The file is read when the student is built; here it need not exist."""
    config, weights = kd_models.write_teacher(tmp_path)
    cfg = kd_models.tiny_cfg(
        MODEL__BACKBONE__NAME="build_retinanet_timm_fpn_backbone",
        MODEL__TIMM__NAME="mobilenetv3_small_050",
        MODEL__TIMM__WEIGHTS="absent.pth",
    )
    student = kd_models.write_config(cfg, tmp_path / "student.yaml")
    cfg = recipe(student, config, teacher_weights=weights)
    assert cfg.MODEL.TIMM.WEIGHTS == "absent.pth"
    assert cfg.KD.PKD.LEVELS == ONE_STAGE_LEVELS


def test_unknown_family_and_unknown_head_get_their_defaults(tmp_path, monkeypatch, capsys):
    @META_ARCH_REGISTRY.register()
    class DetectorOfNoFamily(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            from detectron2.modeling import build_backbone

            self.backbone = build_backbone(cfg)

    @IMITATION_HEAD_REGISTRY.register()
    class HeadOfNoRecipe(ImitationHead):
        pass

    try:
        config, weights = kd_models.write_teacher(tmp_path)
        cfg = kd_models.tiny_cfg(MODEL__META_ARCHITECTURE="DetectorOfNoFamily")
        student = kd_models.write_config(cfg, tmp_path / "student.yaml")
        found = recipe(student, config, "CWD", teacher_weights=weights)
        assert found.KD.CWD == cfg.KD.CWD
        said = capsys.readouterr().out
        assert "own defaults" in said
        assert "other student (DetectorOfNoFamily)" in said
        assert "kd-calibrate suggests" in said

        found = recipe(method="headofnorecipe")
        assert found.KD.HEADS == ("HeadOfNoRecipe",)
        assert "recipe: HeadOfNoRecipe with the head's own defaults" in capsys.readouterr().out
    finally:
        META_ARCH_REGISTRY._obj_map.pop("DetectorOfNoFamily")
        IMITATION_HEAD_REGISTRY._obj_map.pop("HeadOfNoRecipe")


def test_user_errors(tmp_path):
    with pytest.raises(
        ConfigError,
        match="--method: no method or imitation head 'CDW'; choose from .*CWD.*you mean .*CWD",
    ):
        recipe(method="CDW")
    with pytest.raises(ConfigError, match="--teacher: .*no_such"):
        recipe(teacher=f"{ZOO}no_such.yaml")
    with pytest.raises(ConfigError, match="--config-file: no such file"):
        recipe(student="absent.yaml")
    with pytest.raises(ConfigError, match="distils already .*--method"):
        recipe(opts=["KD.HEADS", "('CWD',)"])
    config = kd_models.write_config(
        kd_models.tiny_cfg(MODEL__META_ARCHITECTURE="NoSuchArch"), tmp_path / "student.yaml"
    )
    with pytest.raises(ConfigError, match="MODEL.META_ARCHITECTURE: no meta-arch 'NoSuchArch'"):
        recipe(student=config)
    fpn_less = f"{ZOO}faster_rcnn_R_50_C4_1x.yaml"
    cfg = recipe(student=RETINA_STUDENT, teacher=fpn_less, method="CWD")
    assert cfg.KD.CWD.LEVELS == ("p4",)  # res4 has the stride of p4
