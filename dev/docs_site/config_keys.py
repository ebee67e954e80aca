"""The page of all config keys: defaults from the code that runs, comments from beside it."""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode, get_cfg

from projects.kd.config import add_kd_config, head_node
from projects.kd.config.key_table import rule_of

ROOT = Path(__file__).resolve().parents[2]
HEAD_KEYS = tuple(head_node(weight=1.0, mask_padding=False))
INTRODUCTION = """# Config keys

This page is made from the code when the site is built: the defaults are those of a fresh config,
the words those of the comments beside them. A key that is unknown or has a value that is not
allowed ends a program with one line that names it.

- A row without words belongs to the one above it, or its name says all there is to say.
- The keys that every imitation head has are explained once, [below](#keys-of-every-head).
- A key of detectron2 is in the last table where its value is checked here.
"""


class Place:
    """Where a key gets its default: file and line."""

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line

    def comment(self) -> str:
        """The comment behind the assignment, or in the lines right above it; "" without."""
        line = linecache.getline(self.file, self.line)
        if "  # " in line:
            return line.partition("  # ")[2].strip()
        words, number = [], self.line - 1
        while (line := linecache.getline(self.file, number).strip()).startswith("#"):
            words.insert(0, line.lstrip("# "))
            number -= 1
        return " ".join(words)


def traced_config() -> tuple[CfgNode, dict[tuple[int, str], Place]]:
    """A fresh config, and for each (id of a node, name) where the project sets it."""
    places: dict[tuple[int, str], Place] = {}
    original = CfgNode.__setattr__

    def traced(node, name, value):
        frame = sys._getframe(1)
        places[id(node), name] = Place(frame.f_code.co_filename, frame.f_lineno)
        original(node, name, value)

    cfg = get_cfg()
    CfgNode.__setattr__ = traced
    try:
        add_kd_config(cfg)
    finally:
        CfgNode.__setattr__ = original
    return cfg, places


class Leaf(NamedTuple):
    """A key that holds a value; ``places`` are those of the key and, where it is the first key of
    a node, of that node."""

    key: str
    value: object
    places: list[tuple[int, str]]


def leaves(node: CfgNode, path: str = "", above: Sequence = ()) -> Iterator[Leaf]:
    """Every key below a node, in the order of the code."""
    for number, (name, value) in enumerate(node.items()):
        places = [(id(node), name), *(above if number == 0 else ())]
        if isinstance(value, CfgNode) and value:
            yield from leaves(value, f"{path}{name}.", places[:1])
        else:  # an empty group has keys of the user's own (KD.TEACHERS)
            yield Leaf(path + name, {} if isinstance(value, CfgNode) else value, places)


@functools.cache
def sections() -> dict[str, list[tuple[str, object, str]]]:
    """Group -> [(key, default, comment), ...] of the project's own keys."""
    stock = {leaf.key for leaf in leaves(get_cfg())}
    cfg, places = traced_config()
    found: dict[str, list[tuple[str, object, str]]] = {}
    for leaf in leaves(cfg):
        known = [places[place] for place in leaf.places if place in places]
        if leaf.key in stock or not known or not known[0].file.startswith(str(ROOT)):
            continue
        comment = next(filter(None, (place.comment() for place in known)), "")
        found.setdefault(group_of(leaf.key), []).append((leaf.key, leaf.value, comment))
    order = ("KD", "SOLVER", "DATA", "INPUT", "TEST", "MODEL")  # by the first words of a group
    rank = {name: place for place, name in enumerate(order)}
    first = {
        group: min((rank[x] for x in order if group.startswith(x)), default=9) for group in found
    }
    return {group: found[group] for group in sorted(found, key=first.__getitem__)}


def group_of(key: str) -> str:
    """``KD.CWD`` and ``MODEL.GFL`` are groups; what lies deeper belongs to them."""
    return ".".join(key.split(".")[:-1][:2])


def is_head(keys: dict[str, object], group: str) -> bool:
    """Whether a group is the node of an imitation head."""
    return all(f"{group}.{name}" in keys for name in HEAD_KEYS)


def cell(text: str) -> str:
    """Text that is safe in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def keys_page() -> str:
    """The Markdown of the page."""
    found = sections()
    defaults = {key: value for rows in found.values() for key, value, _ in rows}
    heads = [group for group in found if is_head(defaults, group)]
    if not heads:
        raise RuntimeError("no imitation head was found among the config keys")
    lines = [INTRODUCTION]
    for group in (group for group in found if group not in heads):
        lines += table(group, found[group])
    lines += ["## Keys of every head {#keys-of-every-head}", ""]
    common = dict.fromkeys(HEAD_KEYS, "")
    for key, _, comment in found[heads[0]]:
        if key.rpartition(".")[2] in common:
            common[key.rpartition(".")[2]] = comment
    common["WEIGHT"] = "Factor of the head's distillation losses."
    lines += ["| key | meaning |", "|---|---|"]
    lines += [f"| `KD.<HEAD>.{name}` | {cell(text)} |" for name, text in common.items()]
    lines += ["", "Defaults that differ from head to head:", ""]
    lines += ["| head | `WEIGHT` | `MASK_PADDING` |", "|---|---|---|"]
    for group in heads:
        weight, padding = defaults[f"{group}.WEIGHT"], defaults[f"{group}.MASK_PADDING"]
        lines.append(f"| `{group}` | `{weight}` | `{padding}` |")
    lines.append("")
    for group in heads:
        usual = {f"{group}.{name}" for name in HEAD_KEYS}
        rows = [row for row in found[group] if row[0] not in usual]
        if rows:
            lines += table(group, rows)
    return "\n".join([*lines, *stock_table(set(defaults)), ""])


def head_table(name: str) -> str:
    """The keys of ``KD.<name>`` that are not every head's, and where the others are explained."""
    node = f"KD.{name.upper()}."
    rows = [(key.removeprefix(node), *rest) for key, *rest in sections()[node[:-1]]]
    own = [row for row in rows if row[0] not in HEAD_KEYS]
    default = {key: value for key, value, _ in rows}
    sentence = (
        f"`{node}WEIGHT` is `{default['WEIGHT']}` and `{node}MASK_PADDING` is "
        f"`{default['MASK_PADDING']}`, if a config does not say otherwise. These and the other "
        "[keys of every head](../reference/keys.md#keys-of-every-head) are explained there."
    )
    if not own:
        return sentence
    lines = [f"Below `{node[:-1]}`:", "", "| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | `{cell(repr(value))}` | {cell(text)} |" for key, value, text in own]
    return "\n".join([*lines, "", sentence])


def table(group: str, rows: list[tuple[str, object, str]]) -> list[str]:
    """Heading and table of one group."""
    lines = [f"## `{group}`" if group else "## Top level", ""]
    lines += ["| key | default | meaning | allowed |", "|---|---|---|---|"]
    for key, value, comment in rows:
        rule = rule_of(key)
        allowed = cell(rule.words) if rule else type(value).__name__
        lines.append(f"| `{key}` | `{cell(repr(value))}` | {cell(comment)} | {allowed} |")
    return [*lines, ""]


def stock_table(own: set[str]) -> list[str]:
    """detectron2's keys whose values are checked here."""
    lines = ["## detectron2's keys that are checked", ""]
    lines += ["Their meaning is in detectron2's own documentation.", ""]
    lines += ["| key | default | allowed |", "|---|---|---|"]
    for leaf in leaves(get_cfg()):
        rule = rule_of(leaf.key)
        if rule and leaf.key not in own:
            lines.append(f"| `{leaf.key}` | `{cell(repr(leaf.value))}` | {cell(rule.words)} |")
    return lines
