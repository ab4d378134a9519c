"""Files that survive a crash: written whole or not at all, and checked against a manifest of sizes and sha256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pix2seq.errors import InputError

DISK_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


def output_folder(path: Path) -> Path:
    """The folder, made where needed. Raises `InputError` where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path} cannot be made ({error.strerror}); give another one") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"folder {path} is read-only; give another one")
    return path


def output_file(path: Path) -> Path:
    """The file's path, its folder made. Raises `InputError` where a folder has its name, or it is read-only."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name, such as {path / 'out.json'}")
    output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{path} is read-only; give another file name")
    return path


@contextmanager
def writing(path: Path, what: str, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn a failure to write in `path` into an `InputError`; `what` is going on, and takes `num_bytes`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code is None and isinstance(error, SafetensorError):
            raise  # about its content, not about the disk
        if code not in DISK_FULL:
            raise InputError(
                f"{path} cannot be written while {what} ({os.strerror(code) if code else error}); "
                "make it writable and go on with --resume auto"
            ) from error
        needed = "" if num_bytes is None else f"{num_bytes} bytes needed, "
        raise InputError(
            f"disk full at {path} while {what}: {needed}{free_bytes(path)} free; "
            "free space and go on with --resume auto"
        ) from error


def free_bytes(path: Path) -> int:
    """Bytes left on the disk of a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_durably(path: Path, content: str) -> None:
    """Put a text file in place of the old one; a crash leaves one of the two, whole."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(content, encoding="utf-8")
        fsync_file(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors tells the cause in words alone
    return int(found[1]) if found else None


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
