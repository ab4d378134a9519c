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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pix2seq.errors import InputError
from pix2seq.files import fsync_file, fsync_folder, output_folder, report_write_errors, sha256, write_atomically

JOURNAL = ".predict.jsonl"
SUFFIXES = (".png", ".json")  # of an image's outputs, in the order in which they are written
VIDEO_SUFFIXES = (".mp4", ".json")


class Outputs:
    """NAME.json and NAME.png of images, and other files by name and suffix, in a folder.

    A name may have folders in front.
    """

    def __init__(self, folder: Path) -> None:
        """Read the journal of earlier runs, if there is one."""
        self.folder = folder
        self._journal = folder / JOURNAL
        self._written: dict[str, set[str]] = defaultdict(set)  # sha256 of all that was ever written to a file
        self._keys: dict[str, str] = {}  # of what was last written under a name
        self._suffixes: dict[str, tuple[str, ...]] = {}
        self._last: dict[str, str] = {}  # sha256 of what was last written to a file
        for line in self._journal.read_bytes().splitlines() if self._journal.is_file() else ():
            try:
                entry = json.loads(line)
                suffixes = tuple(entry.get("suffixes", SUFFIXES))
                self._note(entry["name"], entry["key"], dict(zip(suffixes, entry["sha256"], strict=True)))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # cut by a kill: its files were not written

    @property
    def written(self) -> frozenset[Path]:
        """Absolute paths of all files that this ever wrote."""
        return frozenset((self.folder / name).absolute() for name in self._written)

    def check(self, names: Mapping[str, tuple[str, ...]], inputs: Iterable[Path], *, overwrite: bool) -> None:
        """Raise `InputError` if an output would replace an input, or, without `overwrite`, a file of somebody else.

        `names` are those of the outputs, with their suffixes. A file that this wrote and that was changed since belongs
        to whoever changed it.
        """
        read = {key: path for path in inputs if (key := _file_key(path)) is not None}
        foreign: list[Path] = []
        for name, suffixes in names.items():
            output_folder((self.folder / name).parent)
            for path in (self.folder / f"{name}{suffix}" for suffix in suffixes):
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
        paths = [self.folder / f"{name}{suffix}" for suffix in self._suffixes.get(name, ())]
        return self._keys.get(name) == key and all(
            path.is_file() and sha256(path) == self._last.get(self._relative(path)) for path in paths
        )

    def write(self, name: str, key: str, content: dict[str, Any], drawing: Image.Image) -> None:
        """Write NAME.png and NAME.json. Raises `InputError` if the disk is full or the folder cannot be written to."""
        stream = io.BytesIO()
        drawing.save(stream, "PNG")
        self.write_files(name, key, {".png": stream.getvalue(), ".json": as_json(content)})

    def write_files(self, name: str, key: str, files: Mapping[str, bytes | Path]) -> None:
        """Write files by suffix, of these bytes, or finished files that are moved. Raises `InputError` as `write`."""
        with report_write_errors(self.folder, f"writing {name}", then="go on with --resume"):
            hashes = {suffix: _digest(content) for suffix, content in files.items()}
            self._append(name, key, hashes)
            for suffix, content in files.items():
                path = self.folder / f"{name}{suffix}"
                if isinstance(content, bytes):
                    write_atomically(path, content)
                else:
                    fsync_file(content)
                    content.replace(path)
                    fsync_folder(path.parent)

    def partial(self, name: str, suffix: str) -> Path:
        """Return where to make a file that `write_files` moves."""
        path = self.folder / f"{name}{suffix}"
        return path.with_name(f".partial-{path.name}")

    def _append(self, name: str, key: str, hashes: dict[str, str]) -> None:
        entry = {"name": name, "key": key, "sha256": list(hashes.values())}
        line = json.dumps(entry if tuple(hashes) == SUFFIXES else entry | {"suffixes": list(hashes)})
        with self._journal.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"  # after a line that a kill cut
            file.write(f"{line}\n".encode())
        fsync_file(self._journal)
        self._note(name, key, hashes)

    def _note(self, name: str, key: str, hashes: dict[str, str]) -> None:
        self._keys[name], self._suffixes[name] = key, tuple(hashes)
        for suffix, digest in hashes.items():
            path = self._relative(self.folder / f"{name}{suffix}")
            self._written[path].add(digest)
            self._last[path] = digest

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def as_json(content: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON file. Raises `ValueError` for numbers that JSON does not have."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


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


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _file_key(path: Path) -> tuple[int, int] | None:
    """Return the device and number of a file, which all of its names share; None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # also a name that is too long, or no name at all
        return None
    return status.st_dev, status.st_ino
