"""YAML settings, read so that no text hangs, takes all memory or ends in a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pix2seq.errors import InputError
from pix2seq.files import read_regular

MAX_BYTES = 1 << 17  # of a file of settings
MAX_VALUES = 10_000  # in it, where a value counts as often as aliases repeat it
MAX_DEPTH = 20
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """The safe loader, to which a date is text: a folder may be called 2026-11-28."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping of a YAML file. Raises `InputError` if there is none."""
    try:
        content = parse_yaml(read_regular(Path(path), max_bytes=MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist; see the folder configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"config {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"config {path} holds a {type(content).__name__}, expected key: value lines")
    return content


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises `ValueError` with one line for every text that has none."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return _number(loader.construct_document(node))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, LookupError) as error:  # `!!bool x` and `!!int ""` are lookups that fail in PyYAML
        raise ValueError(" ".join(str(error).split()) or "a value does not fit its tag") from None


def _check(node: yaml.Node) -> None:
    """Raise `ValueError` for a node of too many values where aliases are written out, too deep, or of another tag."""
    pending, count = [(node, 1)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(
                f"it has more than {MAX_VALUES} values, where aliases count each time, or is nested more than "
                f"{MAX_DEPTH} deep"
            )
        if node.tag not in TAGS:
            raise ValueError(f"the tag {node.tag} is not one of a setting")
        for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
            pending += [(part, depth + 1) for part in (entry if isinstance(entry, tuple) else (entry,))]


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4, which YAML 1.1 reads as strings."""
    if isinstance(value, Mapping):
        return {key: _number(entry) for key, entry in value.items()}
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "0123456789.+-" else value
        except ValueError:
            return value
    return value
