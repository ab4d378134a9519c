"""What mkdocs cannot do by itself: the tables of settings, and links from pages to files of the repository."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import posixpath
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pix2seq.settings import Range, Settings
from pix2seq.training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- settings -->"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s#]*)(#[^)\s]*)?\)")

log = logging.getLogger("mkdocs.hooks")  # a warning fails the build, which is strict


class Setting(NamedTuple):
    """One row of a table."""

    key: str  # in full: model.encoder.dim
    default: str
    kind: str  # type and range, in words
    meaning: str  # the comment beside it


def on_page_markdown(markdown: str, *, page: Any, config: Mapping[str, Any], **_: Any) -> str:
    """Fill in the tables of settings, and turn links to files outside the site into links to the repository."""
    if MARKER in markdown:
        markdown = markdown.replace(MARKER, settings_tables())
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, link))
        if path.startswith("docs/"):
            return match.group()
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        if not config["repo_url"]:
            return text
        return f"{image}[{text}]({config['repo_url'].rstrip('/')}/blob/main/{path}{anchor or ''})"

    return LINK.sub(replaced, markdown)


def settings_tables() -> str:
    """Return a table of all settings for each section, as Markdown."""
    sections: dict[str, list[Setting]] = {}
    for setting in all_settings(load_config(None)):
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    lines = []
    for section, rows in sections.items():
        lines += ["", f"## {section or 'Of a run'}", "", "| setting | default | takes | |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.key}`", f"`{row.default}`", row.kind, row.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def all_settings(config: Settings, prefix: str = "") -> Iterator[Setting]:
    """Yield a config's own settings, then those of its sections."""
    kind: Any = type(config)
    hints, comments = get_type_hints(kind, include_extras=True), field_comments(kind)
    sections = []
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if isinstance(value, Settings):
            sections.append((value, f"{prefix}{field.name}."))
        else:
            yield Setting(prefix + field.name, shown(value), in_words(hints[field.name]), comments.get(field.name, ""))
            sections += [(part(), f"{prefix}{field.name}.") for part in get_args(hints[field.name]) if is_section(part)]
    for value, name in sections:
        yield from all_settings(value, name)


def is_section(hint: Any) -> bool:
    """Return whether a type is one of settings, which a field may hold in place of null."""
    return isinstance(hint, type) and issubclass(hint, Settings)


def shown(value: Any) -> str:
    """Return a default as YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def in_words(hint: Any) -> str:
    """Return a type and its range in words: `whole number, 1 to 65536`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [limit for rule in parts[1:] if isinstance(rule, Range) and (limit := range_in_words(rule))]
        return ", ".join([in_words(parts[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if part is type(None) else in_words(part) for part in parts)
    if origin is tuple:
        each = {in_words(part): None for part in parts if part is not ...}
        number = "list" if ... in parts else f"{len(parts)} values"
        return f"{number} of {' and '.join(each)}" if len(each) == 1 else f"{number}: {', '.join(each)}"
    if origin is dict:
        return f"mapping of names to {in_words(parts[1])}"
    if is_section(hint):
        return "the settings of that section"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        Any: "text or a mapping of tasks",
    }
    return names[hint]


def range_in_words(rule: Range) -> str:
    """Return the limits of a number in words."""
    low, high = (rule.least, "from") if rule.least is not None else (rule.above, "above")
    most, under = (rule.most, "to") if rule.most is not None else (rule.below, "below")
    return " ".join(f"{word} {number:,.12g}" for number, word in ((low, high), (most, under)) if number is not None)


def field_comments(kind: type[Any]) -> dict[str, str]:
    """Return the comment beside or above each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not (dataclasses.is_dataclass(base) and issubclass(base, Settings)) or base.__module__ == "types":
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue  # made by `load_config` at run time, from classes that have a source
        lines = source.splitlines()
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            assert node.end_lineno is not None
            _, _, beside = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")
            above: list[str] = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip(" #"))
            found[node.target.id] = beside.strip() or " ".join(above)
    return found
