"""Exported detectors find what the detectors find, on images of sizes they were not traced with."""

import itertools
import json
import multiprocessing
import os
import signal

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


DENSE = {"MODEL__BACKBONE__NAME": "build_toy_fpn_backbone"}
TWO_LEVELS = {  # each costs a graph its own suppression
    **DENSE,
    "MODEL__RPN__IN_FEATURES": ["p3", "p4"],
    "MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p4"],
    "MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32]],
}
PIXELS = {"MODEL__BACKBONE__NAME": "build_toy_backbone"}
SEGMENTORS = {
    "pspnet": {**PIXELS, "MODEL__SEM_SEG_HEAD__COMMON_STRIDE": 32},
    "deeplab": {
        **PIXELS,
        "MODEL__SEM_SEG_HEAD__COMMON_STRIDE": 8,
        "MODEL__SEM_SEG_HEAD__IN_FEATURES": ["res3", "res5"],
        "MODEL__SEM_SEG_HEAD__PROJECT_FEATURES": ["res3"],
        "INPUT__CROP__ENABLED": True,
        "INPUT__CROP__TYPE": "absolute",
        "INPUT__CROP__SIZE": [32, 64],
    },
}


def cfg_of(name):
    if name == "ConditionalDETR":  # padded to more than a cell of its map
        return tiny_cfg(name, **DENSE, MODEL__CONDITIONAL_DETR__IN_FEATURE="p3")
    if name == "Panoptic FPN":  # the semantic branch sums up all levels
        return detector_cfg(name, **TWO_LEVELS, MODEL__SEM_SEG_HEAD__IN_FEATURES=["p3", "p4"])
    if name in SEGMENTORS:
        return segmentation.segmentor_cfg(name, **SEGMENTORS[name])
    if DETECTORS[name][0] != "RetinaNet":
        return detector_cfg(name, **TWO_LEVELS)
    levels = {f"MODEL__{name.upper()}__IN_FEATURES": ["p3", "p4"]}
    return detector_cfg(name, **DENSE, **levels, MODEL__ANCHOR_GENERATOR__SIZES=[[16], [32]])


def nothing_on_one_colour(model):
    """Raise a one-stage detector's threshold above what it finds on a colour; returns that image.

    Of eight colours, that with the lowest scores.
    """
    graph = graph_of(model, suppress=False)
    colours = torch.tensor(list(itertools.product((0.0, 255.0), repeat=3)))
    images = colours[:, :, None, None].expand(-1, -1, 96, 64)
    _, scores, _ = graph(images)
    limits = scores.flatten(1).amax(1)
    model.test_score_thresh = limits.min().item() + 1e-4
    return {"image": images[limits.argmin()]}


@pytest.mark.parametrize(
    ("name", "suffix", "suppress"),
    [
        ("RetinaNet", ".onnx", False),
        ("FCOS", ".ts", True),
        ("GFL", ".onnx", True),
        ("RepPoints", ".onnx", True),
        ("Keypoint R-CNN", ".onnx", True),
        ("Panoptic FPN", ".ts", True),
        ("ConditionalDETR", ".onnx", True),
        ("pspnet", ".onnx", True),
    ],
)
@torch.no_grad()
def test_an_exported_detector_finds_the_same(tmp_path, name, suffix, suppress):
    if suffix == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    cfg = cfg_of(name)
    model = sharp(cfg)
    plain = nothing_on_one_colour(model) if name in ("GFL", "RepPoints") else None
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
    if plain:  # empty tensors go through
        assert len(exported([plain])[0]["instances"]) == 0
    if graph.batch:  # two images at once give what each gives alone
        images = torch.rand(2, 3, 70, 90) * 255
        for both, one in zip(exported.run(images), exported.run(images[1:]), strict=True):
            if both.dim() > 1:
                torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-3)


def test_deeplab_takes_multiples_of_its_crops(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    cfg = cfg_of("deeplab")
    graph = graph_of(sharp(cfg))
    path, facts = tmp_path / "student.onnx", facts_of(cfg, graph)
    assert facts["input"]["multiples_of"] == [32, 64]
    formats.write(str(path), graph, facts)
    exported = ExportedDetector.load(str(path), threads=1)
    image = torch.rand(3, 96, 128) * 255
    assert differences(graph.model, exported, [{"image": image}]).scores < 1e-4
    with pytest.raises(DataError, match=r"\(75, 101\) pixels .* takes multiples of \[32, 64\]"):
        exported(items(1))
    with pytest.raises(ConfigError, match="--size is 96x96, .* takes multiples of 32x64"):
        formats.write(str(tmp_path / "student.pt2"), graph, facts, size=(96, 96))


def test_torch_export_takes_one_size(tmp_path):
    cfg = cfg_of("FCOS")
    graph = graph_of(build(cfg), suppress=False)
    facts = facts_of(cfg, graph)
    with pytest.raises(ConfigError, match="--size: a torch.export file takes images of one size"):
        formats.write(str(tmp_path / "student.pt2"), graph, facts)
    facts["input"]["shape"] = [1, 3, 96, 64]  # as in a file, whose writing takes half a minute
    exported = ExportedDetector(graph.forward, facts)
    other, right = items()
    assert len(exported([right])[0]["instances"]) > 0
    with pytest.raises(DataError, match=r"has \(75, 101\) pixels .* takes \[96, 64\]"):
        exported([other])


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "GFL", "RepPoints"])
@torch.no_grad()
def test_suppression_outside_is_the_detectors_own(name):
    cfg = cfg_of(name)
    cfg.MODEL[name.upper()].TOPK_CANDIDATES_TEST = 20
    model = sharp(cfg)
    image = items(1)[0]["image"][None].float()
    graph = graph_of(model, suppress=False)
    everything = dict(zip(graph.outputs, graph(image), strict=True))
    model.test_score_thresh = everything["scores"].quantile(0.9).item()
    boxes, scores, classes = graph_of(model)(image)
    limits = facts_of(cfg, graph)["after"]["suppression"]
    assert limits["score_above"] == model.test_score_thresh and limits["best_of_a_level"] == 20
    found = suppressed(
        everything["boxes"][0], everything["scores"][0], everything["levels"], **limits
    )
    assert len(boxes) > 3
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


@pytest.mark.parametrize("signum", [signal.SIGKILL, None])
def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, signum):
    path, beside = tmp_path / "student.ts", tmp_path / "student.ts.json"
    path.write_text("the old one")
    beside.write_text("{}")
    cfg = cfg_of("FCOS")
    graph = graph_of(build(cfg))

    def cut_off(traced, file, **options):
        file.write(b"half")
        file.flush()
        if signum:
            os.kill(os.getpid(), signum)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.jit, "trace", lambda *args, **options: None)
    monkeypatch.setattr(torch.jit, "save", cut_off)
    words = str(path), graph, facts_of(cfg, graph)
    if signum:
        process = multiprocessing.get_context("fork").Process(target=formats.write, args=words)
        process.start()
        process.join()
        assert process.exitcode == -signum
        assert path.read_text() == "the old one" and beside.read_text() == "{}"
        monkeypatch.undo()
        formats.write(*words)  # as ever, whatever was left
        assert torch.jit.load(str(path))
    else:
        with pytest.raises(KeyboardInterrupt):
            formats.write(*words)
        assert path.read_text() == "the old one" and beside.read_text() == "{}"
    assert sorted(tmp_path.iterdir()) == [path, beside]
