"""Which imitation head works with which detector, found by asking the heads themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from detectron2.modeling import build_model

from ..config import load_config
from ..errors import ConfigError
from ..heads.base import IMITATION_HEAD_REGISTRY, build_imitation_heads
from ..levels import pair_levels
from ..teacher_building import paired_infos

BEGIN, END = "<!-- methods x detectors: begin -->", "<!-- methods x detectors: end -->"
PLAIN = "yes"  # a head that takes no target


def verdicts(student_cfg, teacher_cfg) -> dict[str, dict[str, str]]:
    """Build every registered head for a pair of detectors, on the meta device.

    Args:
        student_cfg, teacher_cfg: configs of the two sides; their weights are not read.

    Returns:
        Head to target (PLAIN for heads without KD.<HEAD>.TARGET) to "" where it works, or to the
        line with which it is refused.
    """
    sides = [_outline(cfg) for cfg in (student_cfg, teacher_cfg)]
    (student, cfg), (model, theirs) = sides
    teacher = SimpleNamespace(model=model, cfg=theirs, shared={})
    level_map = pair_levels(cfg.KD.LEVEL_MAP, student.backbone, model.backbone)
    infos = paired_infos(cfg, student, teacher, level_map)
    found: dict[str, dict[str, str]] = {}
    for name, cls in sorted(IMITATION_HEAD_REGISTRY):
        if not cls.__module__.startswith("projects."):
            continue
        # a head with a key TARGET lists its values in the class attribute ``targets``
        targets = cls.targets if "TARGET" in cfg.KD[name.upper()] else (PLAIN,)
        found[name] = {target: _verdict(cfg, infos, name, target) for target in targets}
    return found


def _outline(cfg):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS = "meta", "", ""
    with torch.device("meta"):
        return build_model(cfg), cfg


def _verdict(cfg, infos, name: str, target: str) -> str:
    cfg = cfg.clone()
    cfg.KD.HEADS = (name,)
    if target != PLAIN:
        cfg.KD[name.upper()].TARGET = target
    try:
        with torch.device("meta"):
            build_imitation_heads(cfg, *infos)
    except ConfigError as error:
        return str(error)
    return ""


def feature_heads(student_cfg, teacher_cfg=None) -> tuple[str, ...]:
    """Heads that work with a pair of detectors (by default of one kind) as they are configured."""
    found = verdicts(student_cfg, teacher_cfg or student_cfg)
    return tuple(
        head
        for head, targets in found.items()
        if not targets.get("features", targets.get(PLAIN, "no such target"))
    )


def support_table(detectors: Mapping[str, tuple[str, str]]) -> str:
    """Markdown: heads by detectors, with the targets that work in each cell.

    Args:
        detectors: name to the config files of a student and a teacher of that kind.
    """
    columns = {
        name: verdicts(*(load_config(path) for path in paths)) for name, paths in detectors.items()
    }
    lines = [
        "| head | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for head in next(iter(columns.values())):
        cells = [_cell(found[head]) for found in columns.values()]
        lines.append(f"| `{head}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(targets: Mapping[str, str]) -> str:
    return ", ".join(target for target, refusal in targets.items() if not refusal) or "-"


def between_markers(text: str, table: str) -> str:
    """A document with the table put between its two markers.

    Raises:
        ConfigError: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise ConfigError(f"the document has no lines '{BEGIN}' and '{END}'")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}{rest[rest.index(END) :]}"


def shapes_detectors(root: str, labels: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Detectors that have a teacher and a student among ``configs/shapes``; the demo's are not new.

    Args:
        root: of the checkout.
        labels: (stem of the files, name of the column), in order; a stem that is not listed comes
            last under its own name.
    """
    folder = os.path.join(root, "configs", "shapes")
    ends = "_teacher.yaml"
    stems = sorted(x.removesuffix(ends) for x in os.listdir(folder) if x.endswith(ends))
    stems = [stem for stem in stems if not stem.endswith("_demo")]  # a detector that is there
    named = dict(labels)
    order = [stem for stem in named if stem in stems] + [x for x in stems if x not in named]
    paths = {
        named.get(stem, stem): tuple(
            os.path.join(folder, f"{stem}_{side}.yaml") for side in ("student", "teacher")
        )
        for stem in order
    }
    return {name: pair for name, pair in paths.items() if all(map(os.path.isfile, pair))}
