"""What the files of a checkpoint must be: manifest.json holds their sizes and sha256.

Written last and before the folder gets its name, so that bytes which change later, or get lost on
the way to another disk, are found before anything is built on them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pix2seq.output import fsync_file, fsync_folder, write_durably

MANIFEST_FILE = "manifest.json"
FORMAT = 1


def seal(folder: Path) -> None:
    """Bring the files of a folder to the disk and write their manifest."""
    sync_files(folder)
    files = {}
    for path in files_in(folder):
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": _sha256(path)}
    write_durably(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def files_in(folder: Path) -> list[Path]:
    """The files in a folder and in those inside it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_files(folder: Path) -> None:
    """Bring the files of a folder, and the names of all of them, to the disk."""
    files = files_in(folder)
    for path in files:
        fsync_file(path)
    for inside in {folder, *(path.parent for path in files)}:
        fsync_folder(inside)


def find_damage(folder: Path, *, leaving_out: tuple[str, ...] = (), quick: bool = False) -> str | None:
    """What is wrong with the files of a folder in a few words, None where nothing is.

    Files and folders in it named in `leaving_out` are not looked at.

    `quick` reads a file only if its size or time of change is not the manifest's. Folders without a
    manifest, of older runs and other tools, are held to what the headers of their safetensors promise.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return _broken_safetensors(folder, leaving_out)
    try:
        files = json.loads(path.read_bytes())["files"]
        for name, expected in files.items():
            if name.split("/")[0] not in leaving_out and (problem := _difference(folder / name, expected, quick=quick)):
                return f"{name} {problem}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
    return None


def _difference(path: Path, expected: dict[str, int | str], *, quick: bool) -> str | None:
    try:
        status = path.stat()
        if status.st_size != expected["bytes"]:
            return f"has {status.st_size} bytes, expected {expected['bytes']}"
        if quick and status.st_mtime_ns == expected["mtime_ns"]:
            return None
        return None if _sha256(path) == expected["sha256"] else "is not as it was written (sha256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _broken_safetensors(folder: Path, leaving_out: tuple[str, ...]) -> str | None:
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in leaving_out:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{path.name} cannot be read ({str(error).splitlines()[0]})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
