"""Read a JSON object with very long lists one entry at a time, without keeping them as Python objects."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from pix2seq.errors import InputError

CHUNK_CHARS = 1 << 22  # characters of the file in memory at once, or one entry if that is longer
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_LONGEST_WORD = 32  # most characters of a number or word that the end of a chunk may cut


def stream_json(path: Path, lists: Collection[str], *, chunk_chars: int = CHUNK_CHARS) -> Iterator[tuple[str, Any]]:
    """Yield the members of the object in a file as (name, value), in file order.

    Members named in `lists` must exist and be lists; their entries are yielded one by one, each as
    (name, entry). NaN and Infinity are accepted, as by `json.loads`, and a byte order mark is skipped.
    Raises `InputError` with file, line and column if the file is not JSON, or if a list is missing or
    occurs twice; earlier entries have been yielded by then.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder, a device or a pipe")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _members(_Scanner(path, file, chunk_chars), set(lists))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; expected a COCO annotation file") from None


def _members(text: _Scanner, lists: set[str]) -> Iterator[tuple[str, Any]]:
    if text.peek() != "{":
        kind = type(text.value()).__name__
        raise InputError(f"{text.path} holds a {kind}, expected a COCO object with {' and '.join(sorted(lists)[::-1])}")
    missing = set(lists)
    for name in text.items("{", "}"):
        text.expect(":")
        if name in lists and text.peek() == "[":
            if name not in missing:
                raise InputError(f"{text.path} has two lists of {name}; expected a COCO annotation file")
            missing.remove(name)
            for entry in text.items("[", "]"):
                yield name, entry
        else:
            text.peek()
            value = text.value()
            if name not in lists:
                yield name, value
    if text.peek():
        raise text.error("Extra data", text.position)
    if missing:
        raise InputError(f"{text.path} has no list of {max(missing)}; expected a COCO annotation file")


class _Scanner:
    """A window on the text of a file that moves forward as it is read."""

    def __init__(self, path: Path, file: TextIO, chunk_chars: int) -> None:
        self.path, self.file, self.chunk_chars = path, file, chunk_chars
        self.decode = json.JSONDecoder().raw_decode
        self.window, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """Return the next character that is not a space, without going past it; empty at the end."""
        while True:
            match = _SPACE.match(self.window, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.window):
                return self.window[self.position]
            if not self._read_on():
                return ""

    def expect(self, character: str) -> None:
        """Go past a required character."""
        if self.peek() != character:
            raise self.error(f"Expecting {character!r} delimiter", self.position)
        self.position += 1

    def items(self, opening: str, closing: str) -> Iterator[Any]:
        """Yield the entries of a list, or the names of an object; the caller reads each name's value."""
        self.expect(opening)
        if self.peek() == closing:
            self.position += 1
            return
        while True:
            if closing == "}" and self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes", self.position)
            yield self.value()
            comma = _COMMA.match(self.window, self.position)
            if comma is not None and comma.end() < len(self.window):  # the usual case
                self.position = comma.end()
                continue
            if self.peek() == closing:
                self.position += 1
                return
            self.expect(",")
            self.peek()

    def value(self) -> Any:
        """Read the value that starts here."""
        while True:
            try:
                value, end = self.decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # If the window ended too early, more text may complete the value.
                cut = error.msg.startswith("Unterminated") or len(self.window) - error.pos < _LONGEST_WORD
                if not cut or not self._read_on():
                    raise self.error(error.msg, error.pos) from None
                continue
            except ValueError as error:  # a whole number of more digits than Python converts
                raise self.error(str(error).partition(":")[0], self.position) from None
            # It may be the first half of a number: the rest in the window may be only `.` or `e+`.
            cut = len(self.window) - end <= 2 and not self.window[end:].strip(".eE+-")
            if cut and self.window[end - 1] not in '}]"' and self._read_on():
                continue
            self.position = end
            return value

    def error(self, message: str, position: int) -> InputError:
        """Return the error for a position of the window."""
        newlines = self.window.count("\n", 0, position)
        line = self.line + newlines
        column = position - self.window.rfind("\n", 0, position) if newlines else self.column + position
        return InputError(
            f"{self.path} is not valid JSON at line {line}, column {column} ({message}); "
            "the file is damaged or cut off: copy it again"
        )

    def _read_on(self) -> bool:
        if self.ended:
            return False
        if not self.position:
            self.chunk_chars *= 2  # so that an entry of any length needs only few attempts
        chunk = self.file.read(self.chunk_chars)
        if not chunk:
            self.ended = True
            return False
        newlines = self.window.count("\n", 0, self.position)
        self.line += newlines
        self.column = (
            self.position - self.window.rfind("\n", 0, self.position) if newlines else self.column + self.position
        )
        self.window, self.position = self.window[self.position :] + chunk, 0
        return True
