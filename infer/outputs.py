"""The files that `predict` writes, and a journal of them.

The journal holds a line for each image: the name of its outputs, a key of all that they depend on, and the sha256 of
each file. It is written before the files are, and files are replaced as a whole. So whatever moment a run is killed
in, the journal knows every file that the command wrote, and an image is done if its files are those of its line.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from pix2seq.errors import InputError
from pix2seq.files import fsync_file, output_folder, report_write_errors, sha256, write_atomically

JOURNAL = ".predict.jsonl"
SUFFIXES = (".png", ".json")  # in the order in which they are written


class Outputs:
    """NAME.json and NAME.png of images, in a folder. A name may have folders in front."""

    def __init__(self, folder: Path) -> None:
        """Read the journal of earlier runs, if there is one."""
        self.folder = folder
        self._journal = folder / JOURNAL
        self._written: dict[str, set[str]] = defaultdict(set)  # sha256 of all that was ever written to a file
        self._keys: dict[str, str] = {}  # of what was last written under a name
        self._last: dict[str, str] = {}  # sha256 of what was last written to a file
        for line in self._journal.read_bytes().splitlines() if self._journal.is_file() else ():
            try:
                entry = json.loads(line)
                self._note(entry["name"], entry["key"], entry["sha256"])
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # cut by a kill: its files were not written

    def check(self, names: Iterable[str], inputs: Iterable[Path], *, overwrite: bool) -> None:
        """Raise `InputError` if an output would replace an input, or, without `overwrite`, a file of somebody else.

        A file that this wrote and that was changed since belongs to whoever changed it.
        """
        read = {key: path for path in inputs if (key := _file_key(path)) is not None}
        foreign: list[Path] = []
        for name in names:
            output_folder((self.folder / name).parent)
            for path in self._paths(name):
                key = _file_key(path)
                if key is None:
                    continue
                if key in read:
                    raise InputError(f"{path} would replace {read[key]}, which is read; give another folder with --out")
                if not path.is_file():
                    raise InputError(f"{path} is in the way and no file; give another folder with --out")
                if not overwrite and sha256(path) not in self._written[self._relative(path)]:
                    foreign.append(path)
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise InputError(
                f"{foreign[0]}{others} would be replaced, but predict did not write what is in there; give another "
                "folder with --out, or replace such files with --overwrite"
            )

    def is_done(self, name: str, key: str) -> bool:
        """Whether the files of a name are complete, and of this key."""
        return self._keys.get(name) == key and all(
            path.is_file() and sha256(path) == self._last.get(self._relative(path)) for path in self._paths(name)
        )

    def write(self, name: str, key: str, content: dict[str, Any], drawing: Image.Image) -> None:
        """Write NAME.png and NAME.json. Raises `InputError` if the disk is full or the folder cannot be written to."""
        stream = io.BytesIO()
        drawing.save(stream, "PNG")
        files = (stream.getvalue(), (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        with report_write_errors(self.folder, f"writing {name}", then="go on with --resume"):
            self._append(name, key, [hashlib.sha256(file).hexdigest() for file in files])
            for path, file in zip(self._paths(name), files, strict=True):
                write_atomically(path, file)

    def _append(self, name: str, key: str, hashes: list[str]) -> None:
        line = json.dumps({"name": name, "key": key, "sha256": hashes})
        with self._journal.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"  # after a line that a kill cut
            file.write(f"{line}\n".encode())
        fsync_file(self._journal)
        self._note(name, key, hashes)

    def _note(self, name: str, key: str, hashes: list[str]) -> None:
        self._keys[name] = key
        for path, digest in zip(self._paths(name), hashes, strict=True):
            self._written[self._relative(path)].add(digest)
            self._last[self._relative(path)] = digest

    def _paths(self, name: str) -> list[Path]:
        return [self.folder / f"{name}{suffix}" for suffix in SUFFIXES]

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def output_names(images: Iterable[Path]) -> dict[Path, str]:
    """Return the name of each image's outputs: its stem, which several images of one stem share with nothing else.

    These get the folders in which they differ in front, and those of one folder keep their suffix. An image that is
    named twice counts once. Raises `InputError` if names are still the same.
    """
    paths = {os.path.abspath(path): path for path in images}
    groups: dict[str, list[str]] = defaultdict(list)
    for absolute in paths:
        groups[Path(absolute).stem.casefold()].append(absolute)  # many disks take names of other case for the same
    names: dict[Path, str] = {}
    for group in groups.values():
        above = os.path.commonpath([os.path.dirname(absolute) for absolute in group])
        relative = {absolute: Path(absolute).relative_to(above) for absolute in group}
        stems = [path.with_name(path.stem).as_posix().casefold() for path in relative.values()]
        for (absolute, path), stem in zip(relative.items(), stems, strict=True):
            short = path.stem if len(group) == 1 else path.with_name(path.stem).as_posix()
            names[paths[absolute]] = short if stems.count(stem) == 1 else path.as_posix()
    first: dict[str, Path] = {}
    for path, name in names.items():
        other = first.setdefault(name.casefold(), path)
        if other != path:
            raise InputError(f"{other} and {path} would both be written to {name}.json; rename one of them")
    return {path: names[path] for path in paths.values()}


def _file_key(path: Path) -> tuple[int, int] | None:
    """Return the device and number of a file, which all of its names share; None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # also a name that is too long, or no name at all
        return None
    return status.st_dev, status.st_ino
