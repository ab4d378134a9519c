"""Places to write to: checked before the work starts, and written so that a crash leaves the old or the new."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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
