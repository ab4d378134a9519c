"""A file of what a model answered about training images, to learn from its mistakes.

The file is named by its content, answers-SHA256.jsonl, so that a setting that names it says which answers a run learns
from, and a resumed run cannot take others without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pix2seq.errors import InputError
from pix2seq.files import output_folder, parse_json, read_regular, report_write_errors, write_atomically

DIGITS = 16  # of the SHA-256 in the name


def write_answers(folder: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records, a line of JSON each, and return the file."""
    content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    path = output_folder(folder) / _name(content)
    with report_write_errors(path, "writing answers", then="free space, and record them again"):
        write_atomically(path, content)
    return path


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file. Raises `InputError` if it is missing, or is not what its name says."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); write it by pix2seq data answers") from None
    if path.name != _name(content):
        raise InputError(f"{path} was changed or renamed: its content is {_name(content)}; write it again")
    return [parse_json(line) for line in content.splitlines()]


def _name(content: bytes) -> str:
    return f"answers-{hashlib.sha256(content).hexdigest()[:DIGITS]}.jsonl"
