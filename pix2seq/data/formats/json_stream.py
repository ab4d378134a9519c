"""Read a JSON object whose lists are too long to be held as Python objects: one entry at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from pix2seq.errors import InputError

CHUNK_CHARS = 1 << 22  # of the file that are held at once, or one entry where that is longer
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_LONGEST_WORD = 32  # a number or word that the end of a chunk cuts is no longer than this


def stream_json(path: Path, lists: Collection[str], *, chunk_chars: int = CHUNK_CHARS) -> Iterator[tuple[str, Any]]:
    """The members of the object in a file, in their order, as (name, value).

    Those named in `lists` must be there and be lists; their entries come one by one, each as (name,
    entry). The rest come whole. As `json.loads` does, this takes NaN and Infinity, and a byte order
    mark is skipped. Raises `InputError` with file, line and column where the file is no JSON, and where
    a list is missing or occurs twice: the entries before have been given by then.
    """
    try:
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
    """A window on the text of a file, which moves on as it is read."""

    def __init__(self, path: Path, file: TextIO, chunk_chars: int) -> None:
        self.path, self.file, self.chunk_chars = path, file, chunk_chars
        self.decode = json.JSONDecoder().raw_decode
        self.window, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """The next character that is no space, without going past it; empty at the end."""
        while True:
            match = _SPACE.match(self.window, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.window):
                return self.window[self.position]
            if not self._read_on():
                return ""

    def expect(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.peek() != character:
            raise self.error(f"Expecting {character!r} delimiter", self.position)
        self.position += 1

    def items(self, opening: str, closing: str) -> Iterator[Any]:
        """The entries of a list, or the names of an object; the caller reads past the name's value."""
        self.expect(opening)
        if self.peek() == closing:
            self.position += 1
            return
        while True:
            if closing == "}" and self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes", self.position)
            yield self.value()
            comma = _COMMA.match(self.window, self.position)
            if comma is not None and comma.end() < len(self.window):  # as nearly always
                self.position = comma.end()
                continue
            if self.peek() == closing:
                self.position += 1
                return
            self.expect(",")
            self.peek()

    def value(self) -> Any:
        """The value that starts here."""
        while True:
            try:
                value, end = self.decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # Where it is the window that ends too early, the text that follows may put it right.
                cut = error.msg.startswith("Unterminated") or len(self.window) - error.pos < _LONGEST_WORD
                if not cut or not self._read_on():
                    raise self.error(error.msg, error.pos) from None
                continue
            # It may be the first half of a number, of which the rest so far, such as `.` or `e+`, is none.
            cut = len(self.window) - end <= 2 and not self.window[end:].strip(".eE+-")
            if cut and self.window[end - 1] not in '}]"' and self._read_on():
                continue
            self.position = end
            return value

    def error(self, message: str, position: int) -> InputError:
        """What is wrong at a position of the window."""
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
            self.chunk_chars *= 2  # so that an entry of any length is tried few times only
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
