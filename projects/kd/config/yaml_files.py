"""YAML text whose mistakes yaml itself lets pass: a key that stands twice, endless references."""

from __future__ import annotations

import yaml

from ..errors import ConfigError

# More entries than this come from references to references ("billion laughs"), not from a person.
MAX_ENTRIES = 200_000


def read_yaml_text(path: str) -> str:
    """The text of a YAML file without the faults that :func:`check_yaml` finds.

    Raises:
        ConfigError: also for a file that cannot be read as UTF-8 text.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read as YAML text: {reason}") from error
    check_yaml(text, path)
    return text


def check_yaml(text: str, path: str) -> None:
    """ConfigError with the line: wrong syntax, a key twice or no text, a value inside itself."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: nested too deeply") from error
    if root is not None:
        _check_node(root, path, {}, ())


def _check_node(node: yaml.Node, path: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Entries below a node, with all that its references stand for."""
    if id(node) in above:
        raise ConfigError(f"{path}: line {_line(node)}: a value refers to itself")
    if id(node) in sizes:
        return sizes[id(node)]
    above = (*above, id(node))
    children = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, path)
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(_check_node(child, path, sizes, above) for child in children)
    if sizes[id(node)] > MAX_ENTRIES:
        raise ConfigError(
            f"{path}: line {_line(node)}: references make more than {MAX_ENTRIES} entries of it"
        )
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode, path: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = _line(key)
        merge = key.tag == "tag:yaml.org,2002:merge"
        if not merge and key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list"
            raise ConfigError(
                f"{path}: line {line}: the key {shown} is no text; write a name, or put it into "
                "quotes"
            )
        if key.value in seen:
            raise ConfigError(
                f"{path}: line {line}: the key {key.value} stands twice, first in line "
                f"{seen[key.value]}; put both together, the first would not count"
            )
        seen[key.value] = line


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
