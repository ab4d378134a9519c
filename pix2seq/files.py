"""Files that survive a crash: written completely or not at all, and checked against a manifest of sizes and sha256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pix2seq.errors import InputError, shortened

if TYPE_CHECKING:
    from torch import Tensor

DISK_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
MANIFEST_FILE = "manifest.json"
FORMAT = 1  # of manifest.json


def read_regular(path: Path, *, max_bytes: int | None = None) -> bytes:
    """Read a file. Raises `OSError` if it is a device or a pipe, which may have no end, or larger than `max_bytes`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {max_bytes}")
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises `ValueError` for every text that has none, however deeply nested."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def output_folder(path: Path) -> Path:
    """Create the folder if needed and return it. Raises `InputError` if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path} cannot be created ({error.strerror}); give another one") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"folder {path} is read-only; give another one")
    return path


def check_new_folder(path: Path) -> None:
    """Raise `InputError` if a path exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already exists and is not an empty folder; name a new one, or remove it first")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` once all is written, and is removed if that fails.

    Raises `InputError` if `path` exists and is not an empty folder.
    """
    check_new_folder(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def output_file(path: Path) -> Path:
    """Create the file's folder and return the path. Raises `InputError` if it is a folder or cannot be written."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name, such as {path / 'out.json'}")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device; give another file name")
    output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{path} is read-only; give another file name")
    return path


@contextmanager
def report_write_errors(
    path: Path, action: str, *, num_bytes: int | None = None, then: str = "continue with --resume auto"
) -> Iterator[None]:
    """Turn a failure to write in `path` into an `InputError`.

    It names the `action` and the `num_bytes` it needs, and says what to do `then`, once the disk is all right.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code is None and isinstance(error, SafetensorError):
            raise  # the content is wrong, not the disk
        if code not in DISK_FULL:
            raise InputError(
                f"{path} cannot be written while {action} ({os.strerror(code) if code else error}); "
                f"make it writable and {then}"
            ) from error
        needed = "" if num_bytes is None else f"{num_bytes} bytes needed, "
        raise InputError(
            f"disk full at {path} while {action}: {needed}{free_bytes(path)} free; free space and {then}"
        ) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises `FileNotFoundError` if there is none, and `InputError` if it cannot be read or is no JSON.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")  # reading from a pipe could wait forever
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(f"{path} is no readable JSON ({reason}); give a whole JSON file") from None


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a path; the path does not have to exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file; a crash leaves either the old or the new file, complete."""
    from safetensors.torch import save_file  # here, because `pix2seq.runtime` has no torch

    partial = path.with_name(f".partial-{path.name}")
    partial.write_bytes(b"")
    mode = partial.stat().st_mode  # safetensors creates files that only their owner can read
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.chmod(mode)
    fsync_file(partial)
    partial.replace(path)
    fsync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, of text in UTF-8; a crash leaves either the old or the new file, complete."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
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
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and in all folders below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fsync_files(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk."""
    files = list_files(folder)
    for path in files:
        fsync_file(path)
    for parent in {folder, *(path.parent for path in files)}:
        fsync_folder(parent)


def write_manifest(folder: Path) -> None:
    """Flush the files of a folder to the disk and write their manifest."""
    fsync_files(folder)
    files = {}
    for path in list_files(folder):
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}
    write_atomically(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def find_damage(folder: Path, *, ignore: tuple[str, ...] = (), quick: bool = False) -> str | None:
    """Return in a few words what is wrong with each damaged file of a folder, or None if all are intact.

    `ignore` names files and folders in it that are not checked. `quick` reads a file only if its size or
    modification time differs from the manifest. A folder without a manifest, from an older run or another tool,
    is checked by the headers of its safetensors files. Only files inside the folder are read.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.exists():
            files = read_json(path)["files"]
            checked = {name: entry for name, entry in files.items() if name.split("/")[0] not in ignore}
            problems = [(name, _difference(folder, name, entry, quick=quick)) for name, entry in checked.items()]
        else:
            problems = _unreadable_safetensors(folder, ignore)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
    damaged = [f"{name} {problem}" for name, problem in problems if problem is not None]
    return ", ".join(shortened(damaged)) or None


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors gives the cause only in its message
    return int(found[1]) if found else None


def _difference(folder: Path, name: str, expected: dict[str, int | str], *, quick: bool) -> str | None:
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
        return "lies outside the folder"  # a manifest is data from elsewhere, and may name any file of the machine
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        if status.st_size != expected["bytes"]:
            return f"has {status.st_size} bytes, expected {expected['bytes']}"
        if quick and status.st_mtime_ns == expected["mtime_ns"]:
            return None
        return None if sha256(path) == expected["sha256"] else "has changed since it was written (sha256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _unreadable_safetensors(folder: Path, ignore: tuple[str, ...]) -> list[tuple[str, str | None]]:
    problems: list[tuple[str, str | None]] = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in ignore:
            try:
                if not path.is_file():
                    raise OSError("it is not a file")
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                problems.append((path.name, f"cannot be read ({str(error).splitlines()[0]})"))
    return problems


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
