"""Weights of Conditional DETR in every published layout load and give identical outputs."""

import argparse
import re

import pytest
import torch
from kd_models import build, make_batch, tiny_cfg, write_config

from projects.kd.commands.convert import PARTS
from projects.kd.errors import ConfigError
from projects.kd.modeling.conditional_detr_weights import (
    COCO_ROWS,
    compare,
    convert,
    detect_layout,
    read_weights,
)


def config():
    return tiny_cfg("ConditionalDETR", MODEL__CONDITIONAL_DETR__NUM_CLASSES=80)


@pytest.fixture(scope="module")
def model():
    """Trained for a few steps: what starts at zero (the last layer for boxes) has values then."""
    trained = build(config(), seed=4).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        sum(trained(make_batch(seed=seed)).values()).backward()
        optimizer.step()
    assert all(layer.weight.any() for layer in trained.bbox_embed.layers)
    return trained.eval()


# --- the inverse maps, written apart from the loader ---------------------------------------------


def torchvision_name(name):
    name = name.removeprefix("stem.")
    name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\d)\.norm", r"bn\1", name)


def all_rows(value):
    """91 class rows, the unused ones full of NaN."""
    result = torch.full((91, *value.shape[1:]), float("nan"))
    result[list(COCO_ROWS)] = value
    return result


def to_official(state):
    result = {}
    for name, value in state.items():
        if name.startswith("backbone."):
            name = "backbone.0.body." + torchvision_name(name.removeprefix("backbone."))
        result[name] = all_rows(value) if name.startswith("class_embed") else value
    return result


HUB_NAMES = {
    "input_proj.": "model.input_projection.",
    "query_embed.": "model.query_position_embeddings.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
}
HUB_NORMS = {
    "encoder": ("self_attn", "final"),
    "decoder": ("self_attn", "encoder_attn", "final"),
}


def to_hugging_face(state, new_names: bool):
    """The layout of files on the hub, or that of the modules of transformers 5."""
    result = {}
    for name, value in state.items():
        if name.startswith("class_embed"):
            value = all_rows(value)
        for ours, theirs in HUB_NAMES.items():
            if name.startswith(ours):
                name = name.replace(ours, theirs)
        if name.startswith("backbone."):
            place = "model.backbone.model." if new_names else "model.backbone.conv_encoder.model."
            name = place + torchvision_name(name.removeprefix("backbone."))
        elif name.startswith("transformer."):
            name = name.replace("transformer.", "model.")
            side = name.split(".")[1]
            for index, norm in enumerate(HUB_NORMS[side], 1):
                name = name.replace(f".norm{index}.", f".{norm}_layer_norm.")
            name = name.replace("cross_attn.out_proj", "encoder_attn.out_proj")
            name = re.sub(r"linear(\d)", r"mlp.fc\1" if new_names else r"fc\1", name)
            if new_names:
                name = name.replace("out_proj", "o_proj")
                name = re.sub(r"\.sa_([qkv])(\w*)_proj", r".self_attn.\1_\2_proj", name)
                name = re.sub(r"\.ca_([qkv])(\w*)_proj", r".encoder_attn.\1_\2_proj", name)
                name = name.replace("v__proj", "v_proj").replace("qpos", "q_pos")
            if "in_proj_" in name:
                kind = name.rsplit("_", 1)[1]
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    result[name.replace(f"in_proj_{kind}", f"{letter}_proj.{kind}")] = part
                continue
        result[name] = value
    return result


def to_detrex(state):
    words = {"q": "query", "k": "key", "v": "value"}
    result = {}
    for name, value in state.items():
        if name.startswith("transformer."):
            place = ".attentions.0.attn" if "encoder" in name else ".attentions.0"
            name = name.replace(".self_attn", place).replace(".cross_attn", ".attentions.1")
            name = re.sub(
                r"\.(sa|ca)_(q|k|v)(\w*?)_proj",
                lambda m: (
                    f".attentions.{int(m[1] == 'ca')}.{words[m[2]]}{'_' if m[3] else ''}{m[3]}_proj"
                ),
                name,
            )
            name = re.sub(r"\.norm(\d)", lambda m: f".norms.{int(m[1]) - 1}", name)
            name = name.replace("decoder.norm.", "decoder.post_norm_layer.")
            name = name.replace("linear1", "ffns.0.layers.0.0").replace(
                "linear2", "ffns.0.layers.1"
            )
        result[name] = value
    return result


LAYOUTS = {
    "official": to_official,
    "hugging face": lambda state: to_hugging_face(state, new_names=False),
    "hugging face, modules": lambda state: to_hugging_face(state, new_names=True),
    "detrex": to_detrex,
    "own": dict,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_gives_identical_outputs(model, layout):
    theirs = LAYOUTS[layout](model.state_dict())
    assert layout == "own" or theirs.keys() != model.state_dict().keys()
    converted = convert(theirs)
    assert converted.layout == layout.split(",")[0]
    fresh = build(config(), seed=5).eval()
    assert not compare(converted.state, fresh), str(compare(converted.state, fresh))
    fresh.load_state_dict(converted.state, strict=False)
    batch = make_batch()
    with torch.no_grad():
        for one, other in zip(model(batch), fresh(batch), strict=True):
            one, other = one["instances"], other["instances"]
            assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
            assert torch.equal(one.scores, other.scores)
            assert torch.equal(one.pred_classes, other.pred_classes)


def test_names_that_are_known_from_the_published_files(model):
    """A few names written out, so that the inverse maps above are checked too."""
    hub = to_hugging_face(model.state_dict(), new_names=False)
    assert "model.decoder.layers.0.ca_qpos_sine_proj.weight" in hub
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in hub
    assert "model.backbone.conv_encoder.model.layer1.0.bn1.running_var" in hub
    modules = to_hugging_face(model.state_dict(), new_names=True)
    assert "model.decoder.layers.0.encoder_attn.q_pos_sine_proj.weight" in modules
    assert "model.decoder.layers.0.self_attn.q_content_proj.bias" in modules
    assert "model.decoder.layers.0.encoder_attn.v_proj.bias" in modules
    detrex = to_detrex(model.state_dict())
    assert "transformer.decoder.layers.0.attentions.1.query_pos_sine_proj.weight" in detrex
    assert "transformer.encoder.layers.0.attentions.0.attn.in_proj_weight" in detrex
    official = to_official(model.state_dict())
    assert "backbone.0.body.layer3.0.downsample.1.running_mean" in official
    assert "transformer.decoder.layers.0.ca_qpos_proj.weight" in official
    assert len(official["class_embed.bias"]) == 91


def test_class_rows_are_those_of_the_coco_categories():
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    things = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
    assert list(COCO_ROWS) == things


def test_a_classifier_of_other_classes_is_left_out_and_listed(model):
    converted = convert(to_official(model.state_dict()), num_classes=6)
    assert not any(name.startswith("class_embed") for name in converted.state)
    assert [note.split(":")[0] for note in converted.notes] == [
        "class_embed.weight",
        "class_embed.bias",
    ]
    assert "91 rows for 6 classes" in converted.notes[0]


@pytest.mark.parametrize(
    "names", [[], ["backbone.stem.conv1.weight"], ["transformer.decoder.layers.0.linear1.weight"]]
)
def test_an_unknown_layout_is_refused(names):
    with pytest.raises(ConfigError, match="layout is none of official, Hugging Face, detrex"):
        detect_layout(names)


def test_what_does_not_match_is_listed(model):
    state = to_official(model.state_dict())
    state["transformer.decoder.extra.weight"] = torch.zeros(2)
    del state["transformer.decoder.norm.bias"]
    state["query_embed.weight"] = torch.zeros(7, 16)
    text = str(compare(convert(state).state, model))
    assert "missing (1): transformer.decoder.norm.bias" in text
    assert "unexpected (1): transformer.decoder.extra.weight" in text
    assert "query_embed.weight is (7, 16), the model has (12, 16)" in text


def test_half_of_a_joint_projection_is_refused(model):
    state = LAYOUTS["hugging face"](model.state_dict())
    del state["model.encoder.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(ConfigError, match="self_attn lacks one of q_proj, k_proj and v_proj"):
        convert(state)


# --- the tool ------------------------------------------------------------------------------------


def run_tool(tmp_path, source, **overrides):
    path = write_config(config(), tmp_path / "detr.yaml")
    output = tmp_path / "out" / "converted.pth"
    options = [part for pair in overrides.items() for part in pair]
    words = ["--config-file", path, "--input", source, "--output", output, *options]
    PARTS.call(["conditional_detr", *words])
    return output


def test_tool_reads_the_authors_training_files(model, tmp_path, capsys):
    """They hold an argparse.Namespace beside the weights."""
    source = tmp_path / "official.pth"
    torch.save(
        {
            "model": to_official(model.state_dict()),
            "args": argparse.Namespace(lr=1e-4),
            "epoch": 49,
        },
        source,
    )
    output = run_tool(tmp_path, source)
    text = capsys.readouterr().out
    assert "official layout" in text and "80 rows of COCO's categories of 91" in text
    cfg = config()
    cfg.MODEL.WEIGHTS = str(output)
    from projects.kd.weights.loading import load_detector

    fresh = build(cfg, seed=6)
    assert load_detector(fresh, str(output), "MODEL.WEIGHTS") == []
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(fresh.state_dict()[name], value), name


def test_tool_reads_safetensors(model, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {k: v.contiguous() for k, v in LAYOUTS["hugging face"](model.state_dict()).items()}
    safetensors.save_file(state, str(tmp_path / "model.safetensors"))
    run_tool(tmp_path, tmp_path / "model.safetensors")
    assert "hugging face layout" in capsys.readouterr().out


def test_tool_refuses_what_does_not_fit(model, tmp_path):
    source = tmp_path / "official.pth"
    state = to_official(model.state_dict())
    torch.save(state, source)
    with pytest.raises(ConfigError, match="does not fit --config-file: .*query_embed.weight is"):
        run_tool(tmp_path, source, **{"MODEL.CONDITIONAL_DETR.NUM_QUERIES": "5"})
    with pytest.raises(ConfigError, match="must end in .pth"):
        words = ["--config-file", "x", "--input", source, "--output", "out.bin"]
        PARTS.call(["conditional_detr", *words])
    torch.save({"model": [1, 2]}, source)
    with pytest.raises(ConfigError, match="holds no state dict"):
        read_weights(str(source))
    source.write_bytes(b"PK not a checkpoint")
    with pytest.raises(ConfigError, match="truncated or not a checkpoint"):
        read_weights(str(source))
