"""Every config loads and builds, and the COCO ones say what the literature says."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from kd_configs import load

from projects.kd import build_training_model, teacher_building
from projects.kd.config.teachers import config_of, module_name, teacher_names
from projects.kd.foreign import foreign_scheme

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("suites", "methods")  # no configs of their own
)
RUNNABLE = [name for name in CONFIGS if not Path(name).name.startswith("Base-")]
# compared in files of their own: test_icd_configs.py, test_sdf_configs.py, test_csa_configs.py
ELSEWHERE = ("_icd", "_sdf", "_hires", "_400", "_csa", "_output_kd")
# further detectors, backbones and pairs: test_detector_configs.py
COCO = [
    name
    for name in RUNNABLE
    if re.match(r"COCO-Detection/(retinanet|faster_rcnn)_R\d+_FPN_(from_R101_|1x)", name)
    and not any(part in name for part in ELSEWHERE)
]
ZOO = "model_zoo://COCO-Detection/"


@pytest.mark.parametrize("name", CONFIGS)
def test_loads(name):
    cfg = load(name)
    # a part that other configs take beside their base
    assert cfg.DATASETS.TRAIN or name == "shapes/Base-student.yaml"
    assert cfg.SOLVER.MAX_ITER > 0


def test_every_run_writes_to_a_folder_of_its_own():
    folders = [load(name).OUTPUT_DIR for name in RUNNABLE]
    assert len(set(folders)) == len(folders)
    assert all(folder.startswith("output/") for folder in folders)
    for name, folder in zip(RUNNABLE, folders, strict=True):
        assert folder.endswith("/" + Path(name).stem)


_TEACHERS: dict = {}  # by file and options: many configs have the same one


@pytest.fixture
def each_teacher_once(monkeypatch):
    """Configs get copies of a teacher that is built once."""
    build = teacher_building.build_from_config

    def once(cfg, path):
        key = path, str(cfg.KD.TEACHER.OPTS)
        if key not in _TEACHERS:
            _TEACHERS[key] = build(cfg, path)
        model, *rest = _TEACHERS[key]
        return copy.deepcopy(model), *rest

    monkeypatch.setattr(teacher_building, "build_from_config", once)


@pytest.mark.parametrize("name", RUNNABLE)
def test_builds_with_its_teacher_and_heads(name, each_teacher_once):
    """On the meta device: shapes and wiring without memory or computing."""
    cfg = load(name)
    cfg.MODEL.DEVICE = "meta"
    for node in (cfg.KD.TEACHER, *cfg.KD.TEACHERS.values()):
        node.WEIGHTS = ""
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    timm = ["MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False]
    scheme = foreign_scheme(cfg.KD.TEACHER.CONFIG_FILE)
    if scheme == "torchscript":
        pytest.skip("its teacher is a file of the user")
    if not scheme:
        cfg.KD.TEACHER.OPTS = ["MODEL.WEIGHTS", "", *timm]
    cfg.KD.TEACHER.ALLOW_MISSING = True
    with torch.device("meta"):
        model = build_training_model(cfg)
    student = model
    if cfg.KD.META_ARCHITECTURE:
        student = model.student
        names = [(x, head) for x in teacher_names(cfg) for head in config_of(cfg, x).KD.HEADS]
        assert list(model.heads) == [module_name(*pair) for pair in names]
        for teacher, head in names:
            kd = config_of(cfg, teacher).KD
            wanted = kd[head.upper()].LEVELS or kd.LEVELS
            assert not wanted or model.heads[module_name(teacher, head)].levels == tuple(wanted)
    assert type(student).__name__ == cfg.MODEL.META_ARCHITECTURE


# --- COCO: the values of the papers and their code ----------------------------------------------


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_plain_r50_is_the_model_zoos_1x_config(detector):
    """Every key, so that a baseline trained here is comparable with the zoo's published AP."""
    ours = load(f"COCO-Detection/{detector}_R50_FPN_1x.yaml")
    zoo = load(f"{ZOO}{detector}_R_50_FPN_1x.yaml")
    for cfg in (ours, zoo):
        cfg.OUTPUT_DIR = ""
        del cfg.MODEL["ROI_MASK_HEAD"]  # not built: MASK_ON is False
    assert ours == zoo


# detector: meta-arch, learning rate, teacher
DETECTORS = {
    "retinanet": ("RetinaNet", 0.01, f"{ZOO}retinanet_R_101_FPN_3x.yaml"),
    "faster_rcnn": ("GeneralizedRCNN", 0.02, f"{ZOO}faster_rcnn_R_101_FPN_3x.yaml"),
}
FGFI = {
    "WEIGHT": 0.01,
    "THRESH_FACTOR": 0.5,
    "ASSIGN": "joint",
    "ADAPTER": "conv3x3",
    "START_ITER": 400,
    "LEVELS": (),
    "MASK_PADDING": True,
}
# method and detector: the head's keys
HEADS = {
    ("fgfi", "retinanet"): FGFI,
    ("fgfi", "faster_rcnn"): FGFI,
    ("cwd", "retinanet"): {
        **{"WEIGHT": 5.0, "TAU": 1.0, "TARGET": "features", "MASK_PADDING": False},
        "LEVELS": ("p3", "p4", "p5", "p6"),
    },
    ("cwd", "faster_rcnn"): {
        **{"WEIGHT": 10.0, "TAU": 1.0, "TARGET": "features", "MASK_PADDING": False},
        "LEVELS": ("p2", "p3", "p4", "p5"),
    },
    ("pkd", "retinanet"): {
        **{"WEIGHT": 10.0, "MASK_PADDING": False},
        "LEVELS": ("p3", "p4", "p5", "p6"),
    },
    ("pkd", "faster_rcnn"): {
        **{"WEIGHT": 6.0, "MASK_PADDING": False},
        "LEVELS": ("p2", "p3", "p4", "p5"),
    },
}
DISTILLED = [
    (method, detector, depth)
    for depth, methods in ((50, ("fgfi", "cwd", "pkd")), (18, ("fgfi", "cwd")))
    for method in methods
    for detector in DETECTORS
]


def test_the_tables_cover_every_coco_config():
    names = {f"COCO-Detection/{d}_R{depth}_FPN_1x.yaml" for d in DETECTORS for depth in (18, 50)}
    for method, detector, depth in DISTILLED:
        names.add(f"COCO-Detection/{detector}_R{depth}_FPN_from_R101_{method}_1x.yaml")
    assert names == set(COCO)


@pytest.mark.parametrize("name", COCO)
def test_coco_schedule_and_learning_rate(name):
    cfg = load(name)
    meta_arch, learning_rate, _ = DETECTORS[Path(name).name.split("_R")[0]]
    assert cfg.MODEL.META_ARCHITECTURE == meta_arch
    assert cfg.SOLVER.BASE_LR == learning_rate
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (90000, (60000, 80000))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GAMMA) == (16, 0.1)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM) == ("SGD", 0.9)
    assert cfg.SOLVER.WEIGHT_DECAY == 1e-4
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)


@pytest.mark.parametrize(("method", "detector", "depth"), DISTILLED)
def test_coco_distillation_values(method, detector, depth):
    plain = load(f"COCO-Detection/{detector}_R{depth}_FPN_1x.yaml")
    cfg = load(f"COCO-Detection/{detector}_R{depth}_FPN_from_R101_{method}_1x.yaml")
    kd = cfg.KD
    assert kd.META_ARCHITECTURE == "DistillMetaArch"
    assert kd.HEADS == (method.upper(),)
    assert kd.TEACHER.CONFIG_FILE == DETECTORS[detector][2]
    assert kd.TEACHER.WEIGHTS == ""  # the zoo's own
    assert (kd.START_ITER, kd.WARMUP_ITERS, kd.END_ITER) == (0, 0, -1)
    node = kd[method.upper()]
    wanted = HEADS[method, detector]
    assert {key: node[key] for key in wanted} == wanted
    if method != "fgfi":
        assert node.START_ITER == -2  # inherits: no warm-up
    for key in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST"):
        assert cfg[key] == plain[key], f"{key} differs from the plain student's"


@pytest.mark.parametrize("detector", list(DETECTORS))
def test_r18_takes_torchvision_images(detector):
    cfg = load(f"COCO-Detection/{detector}_R18_FPN_1x.yaml")
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS) == (18, 64)
    assert cfg.INPUT.FORMAT == "RGB"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * value for value in mean])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * value for value in std])
    assert cfg.MODEL.WEIGHTS == "pretrained/resnet18_torchvision.pth"
