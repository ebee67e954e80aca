"""Published weights of Conditional DETR under the names of this project.

Three layouts besides our own are told apart by their keys: the authors' ("official"), Hugging Face
transformers ("hugging face", the layout of files on its hub and that of transformers 5 modules) and
detrex. The first two have 91 class rows, one for every COCO category id.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..files import resolve_weights
from ..weights.files import read_torch_file
from .resnet_names import detectron2_name

# COCO has category ids up to 90, these are not used
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_ROWS = tuple(i for i in range(1, 91) if i not in UNUSED_COCO_IDS)
ALL_ROWS = 91

_PROJECTIONS = {
    "query_content": "qcontent",
    "query_pos_sine": "qpos_sine",
    "query_pos": "qpos",
    "key_content": "kcontent",
    "key_pos": "kpos",
    "value": "v",
    "q_content": "qcontent",
    "q_pos_sine": "qpos_sine",
    "q_pos": "qpos",
    "k_content": "kcontent",
    "k_pos": "kpos",
    "v": "v",
}
# detrex: (pattern, replacement), tried in order on every name
_DETREX = (
    (r"\.attentions\.0\.attn\.", ".self_attn."),
    (r"\.attentions\.0\.out_proj\.", ".self_attn.out_proj."),
    (r"\.attentions\.1\.out_proj\.", ".cross_attn.out_proj."),
    (r"\.attentions\.0\.(\w+)_proj\.", lambda m: f".sa_{_projection(m[1])}_proj."),
    (r"\.attentions\.1\.(\w+)_proj\.", lambda m: f".ca_{_projection(m[1])}_proj."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"\.norms\.(\d)\.", lambda m: f".norm{int(m[1]) + 1}."),
    (r"decoder\.post_norm_layer\.", "decoder.norm."),
)
_HUGGING_FACE = (
    (r"^model\.", ""),
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"^input_projection\.", "input_proj."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"decoder\.layernorm\.", "decoder.norm."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.encoder_attn\.out_proj\.", ".cross_attn.out_proj."),
    (r"(decoder\S*)\.self_attn\.(?!out_proj)(\w+)_proj\.", r"\1.sa_\2_proj."),
    (r"\.encoder_attn\.(\w+)_proj\.", r".ca_\1_proj."),
    (r"\.(sa|ca)_([qk]_\w+)_proj\.", lambda m: f".{m[1]}_{_projection(m[2])}_proj."),
    (r"\.(?:mlp\.)?fc(\d)\.", r".linear\1."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
)


def _projection(name: str) -> str:
    return _PROJECTIONS.get(name, name)


@dataclass
class Converted:
    """Renamed weights.

    Attributes:
        layout: "official", "hugging face", "detrex" or "own".
        state: name to tensor, with our names.
        notes: what was changed beside the names.
    """

    layout: str
    state: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


def detect_layout(names) -> str:
    """The layout of a state dict, by its keys.

    Raises:
        ConfigError: none of the known ones.
    """
    names = list(names)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if has(r"^transformer\..*\.ca_qpos_sine_proj\."):
        return "official" if has(r"^backbone\.0\.body\.") else "own"
    if has(r"^(model\.)?decoder\..*(ca_qpos_sine_proj|encoder_attn\.q_pos_sine_proj)\."):
        return "hugging face"
    if has(r"^transformer\..*\.attentions\.1\.query_pos_sine_proj\."):
        return "detrex"
    raise ConfigError(
        "weights: the layout is none of official, Hugging Face, detrex or our own Conditional "
        f"DETR; first names: {', '.join(names[:4]) or 'none'}"
    )


def convert(state: Mapping[str, torch.Tensor], num_classes: int = 80) -> Converted:
    """Rename a state dict of any known layout, and choose its class rows.

    Args:
        state: name to tensor.
        num_classes: rows wanted. 80 of a file with 91 are those of the COCO categories; with any
            other pair of numbers the classifier is left out, which ``notes`` says.
    """
    layout = detect_layout(state)
    rename = {
        "official": _from_official,
        "hugging face": _from_hugging_face,
        "detrex": lambda name: _apply(_DETREX, name),
        "own": lambda name: name,
    }[layout]
    renamed = {
        rename(name): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    result = Converted(layout, _join_projections(renamed))
    _choose_rows(result, num_classes)
    return result


def _apply(rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _from_official(name: str) -> str:
    prefix = "backbone.0.body."
    if name.startswith(prefix):
        return f"backbone.{detectron2_name(name[len(prefix) :])}"
    return name


def _from_hugging_face(name: str) -> str:
    body = re.match(r"^(?:model\.)?backbone\.(?:conv_encoder\.)?model\.(.*)$", name)
    if body:
        return f"backbone.{detectron2_name(body[1])}"
    return _apply(_HUGGING_FACE, name)


def _join_projections(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Separate query, key and value projections of the encoder become one (3 D, D) tensor."""
    result = {}
    pattern = re.compile(r"^(transformer\.encoder\..*\.self_attn)\.([qkv])_proj\.(weight|bias)$")
    for name, value in state.items():
        found = pattern.match(name)
        if found is None:
            result[name] = value
        elif found[2] == "q":
            parts = [state.get(f"{found[1]}.{x}_proj.{found[3]}") for x in "qkv"]
            if any(part is None for part in parts):
                raise ConfigError(f"weights: {found[1]} lacks one of q_proj, k_proj and v_proj")
            result[f"{found[1]}.in_proj_{found[3]}"] = torch.cat(parts)
    return result


def _choose_rows(converted: Converted, num_classes: int) -> None:
    state = converted.state
    for name in ("class_embed.weight", "class_embed.bias"):
        if name not in state or len(state[name]) == num_classes:
            continue
        if len(state[name]) == ALL_ROWS and num_classes == len(COCO_ROWS):
            state[name] = state[name][list(COCO_ROWS)]
            converted.notes.append(f"{name}: the {num_classes} rows of COCO's categories of 91")
        else:
            rows = len(state.pop(name))
            converted.notes.append(f"{name}: left out, {rows} rows for {num_classes} classes")


@dataclass
class Mismatch:
    """How a state dict differs from a model.

    Attributes:
        missing: names of the model that the weights lack.
        unexpected: names of the weights that the model lacks.
        shapes: name to (shape in the weights, shape in the model).
    """

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"missing ({len(self.missing)}): {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"unexpected ({len(self.unexpected)}): {', '.join(self.unexpected)}")
        for name, (theirs, ours) in self.shapes.items():
            parts.append(f"{name} is {theirs}, the model has {ours}")
        return "; ".join(parts)


def compare(state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> Mismatch:
    """What does not match between renamed weights and a model."""
    own = model.state_dict()
    skip = "num_batches_tracked"
    return Mismatch(
        missing=[name for name in own if name not in state and not name.endswith(skip)],
        unexpected=[name for name in state if name not in own],
        shapes={
            name: (tuple(value.shape), tuple(own[name].shape))
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        },
    )


def read_weights(path: str, key: str = "weights") -> dict[str, torch.Tensor]:
    """The state dict in a .pth or .safetensors file; no code of the file is run.

    The authors' files also hold an ``argparse.Namespace``, which is allowed.
    """
    path = resolve_weights(path, key)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = read_torch_file(path, key)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise ConfigError(f"{key}: '{path}' holds no state dict (names to tensors)")
    return state
