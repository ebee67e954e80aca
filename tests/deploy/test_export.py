"""Exported detectors find what the detectors find, on images of sizes they were not traced with."""

import json

import pytest
import segmentation
import torch
import toy_data  # noqa: F401  (registers the toy backbone)
from detectron2.data import MetadataCatalog
from kd_detectors import DETECTORS, detector_cfg
from kd_models import build, tiny_cfg

from projects.kd.deploy import formats, graphs
from projects.kd.deploy.facts import facts_of
from projects.kd.deploy.finish import suppress as suppressed
from projects.kd.deploy.graphs import graph_of
from projects.kd.deploy.parity import differences
from projects.kd.deploy.runtime import ExportedDetector
from projects.kd.errors import ConfigError, DataError


def sharp(cfg, seed=0):
    """A detector whose random scores are far apart, so that nothing hangs on rounding."""
    model = build(cfg, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if any(x in name for x in ("cls_score", "objectness", "class_embed", "predictor.weight")):
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


def items(number=2, seed=0):
    """Images of two sizes, results wanted for larger ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(75, 101), (96, 64)][:number]
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "height": 2 * size[0],
            "width": 2 * size[1],
        }
        for size in sizes
    ]


TOY = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}  # p3 to p7


def cfg_of(name):
    if DETECTORS.get(name, ("",))[0] == "RetinaNet":
        return detector_cfg(name, **TOY)
    if name in segmentation._NETWORKS:
        return segmentation.segmentor_cfg(name)
    return detector_cfg(name) if name in DETECTORS else tiny_cfg(name)


@pytest.mark.parametrize(
    ("name", "suffix", "suppress"),
    [
        ("RetinaNet", ".onnx", False),
        ("FCOS", ".onnx", True),
        ("GFL", ".ts", True),
        ("RepPoints", ".onnx", False),
        ("Keypoint R-CNN", ".onnx", True),
        ("Panoptic FPN", ".ts", True),
        ("ConditionalDETR", ".onnx", True),
        ("pspnet", ".onnx", True),
    ],
)
def test_an_exported_detector_finds_the_same(tmp_path, name, suffix, suppress):
    if suffix == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    cfg = cfg_of(name)
    model = sharp(cfg)
    graph = graph_of(model, suppress)
    path = str(tmp_path / f"student{suffix}")
    formats.write(path, graph, facts_of(cfg, graph))
    exported = ExportedDetector.load(path, threads=1)
    assert exported.facts == json.loads((tmp_path / f"student{suffix}.json").read_text())
    found = differences(model, exported, items())
    if "boxes" in graph.outputs:
        assert found.detections > 10 and found.alone == 0
    assert found.boxes < 1e-3 and found.scores < 1e-4 and found.keypoints < 0.5
    assert found.masks < 0.01 and found.sem_seg < 1e-3
    if graph.batch:  # two images at once give what each gives alone
        images = torch.rand(2, 3, 70, 90) * 255
        for both, one in zip(exported.run(images), exported.run(images[1:]), strict=True):
            if both.dim() > 1:
                torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["GFL", "RepPoints"])
def test_an_image_in_which_nothing_is_found(tmp_path, name):
    pytest.importorskip("onnxruntime")
    cfg = cfg_of(name)
    cfg.MODEL[name.upper()].SCORE_THRESH_TEST = 1.0
    graph = graph_of(build(cfg))
    path = str(tmp_path / "student.onnx")
    formats.write(path, graph, facts_of(cfg, graph))
    results = ExportedDetector.load(path, threads=1)(items())
    assert [len(x["instances"]) for x in results] == [0, 0]


def test_torch_export_takes_one_size(tmp_path):
    cfg = cfg_of("FCOS")
    graph = graph_of(build(cfg), suppress=False)
    facts = facts_of(cfg, graph)
    with pytest.raises(ConfigError, match="--size: a torch.export file takes images of one size"):
        formats.write(str(tmp_path / "student.pt2"), graph, facts)
    facts["input"]["shape"] = [1, 3, 96, 64]
    exported = ExportedDetector(graph.forward, facts)
    other, right = items()
    assert len(exported([right])[0]["instances"]) > 0
    with pytest.raises(DataError, match=r"has \(75, 101\) pixels .* takes \[96, 64\]"):
        exported([other])


def test_suppression_outside_is_the_detectors_own():
    cfg = cfg_of("RetinaNet")
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 20
    model = sharp(cfg)
    image = items(1)[0]["image"][None].float()
    with torch.no_grad():
        boxes, scores, classes = graph_of(model)(image)
        graph = graph_of(model, suppress=False)
        everything = dict(zip(graph.outputs, graph(image), strict=True))
    limits = facts_of(cfg, graph)["after"]["suppression"]
    assert limits["score_above"] == 0.3 and limits["best_of_a_level"] == 20
    found = suppressed(
        everything["boxes"][0], everything["scores"][0], everything["levels"], **limits
    )
    assert len(boxes) > 10
    for ours, theirs in zip(found, (boxes, scores, classes), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_facts_say_what_goes_in_and_what_is_left(tmp_path):
    cfg = detector_cfg("Faster R-CNN", DATASETS__TRAIN=("shapes_train",), INPUT__FORMAT="RGB")
    facts = facts_of(cfg, graph_of(build(cfg)))
    assert facts["thing_classes"] == list(MetadataCatalog.get("shapes_train").thing_classes)
    given = facts["input"]
    assert given["channels"] == "RGB" and given["shape"] == [1, 3, "height", "width"]
    assert given["resize"]["shortest_edge"] == cfg.INPUT.MIN_SIZE_TEST
    assert given["in_the_graph"]["std"] == cfg.MODEL.PIXEL_STD
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("name", "changes", "suffix", "suppress", "line"),
    [
        ("Faster R-CNN", {}, ".pt2", True, "depends on the image; take .onnx or .ts"),
        ("FCOS", {}, ".pt2", True, "add --no-nms"),
        ("Faster R-CNN", {}, ".onnx", False, "--no-nms: GeneralizedRCNN suppresses between"),
        (
            "Faster R-CNN",
            {
                "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
                "MODEL__LOAD_PROPOSALS": True,
            },
            ".ts",
            True,
            "MODEL.PROPOSAL_GENERATOR.NAME: NoneType cannot be exported",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    tmp_path, name, changes, suffix, suppress, line
):
    cfg = detector_cfg(name, **changes)
    path = tmp_path / f"student{suffix}"
    path.write_text("the old one")
    with pytest.raises(ConfigError, match=line) as error:
        graph = graph_of(build(cfg), suppress)
        formats.write(str(path), graph, facts_of(cfg, graph), size=(64, 64))
    assert "\n" not in str(error.value)
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]


def test_other_detectors_and_deformable_convolutions_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="MODEL.META_ARCHITECTURE: Linear cannot be exported"):
        graph_of(torch.nn.Linear(1, 1))
    monkeypatch.setattr(graphs, "DeformConv", torch.nn.Conv2d)  # which may not be compiled in
    with pytest.raises(ConfigError, match="MODEL.RESNETS.DEFORM_ON_PER_STAGE: backbone"):
        graph_of(build(cfg_of("FCOS")))


def test_opsets_and_missing_packages(monkeypatch):
    graph = graph_of(build(detector_cfg("RepPoints")))
    formats.check_opset(17)
    for opset, given, line in ((16, None, r"must lie in \[17, 20\]"), (17, graph, "from opset 19")):
        with pytest.raises(ConfigError, match=f"--opset is {opset}.*{line}"):
            formats.check_opset(opset, given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnx onnxruntime"):
        formats.require_onnx("--output")


def test_what_is_no_exported_file(tmp_path):
    path = tmp_path / "student.ts"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: .* is not a detector that kd-export"):
        ExportedDetector.load(str(path))
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: no such file"):
        ExportedDetector.load(str(tmp_path / "none.pt2"))
    with pytest.raises(ConfigError, match="has to end in .onnx"):
        formats.format_of("student.pb")


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "student.ts"
    path.write_text("the old one")
    cfg = detector_cfg("FCOS")
    graph = graph_of(build(cfg))

    def killed(traced, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.jit, "trace", lambda *args, **options: None)
    monkeypatch.setattr(torch.jit, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        formats.write(str(path), graph, facts_of(cfg, graph))
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]
