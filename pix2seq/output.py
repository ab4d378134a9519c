"""Places to write to, checked before the work starts."""

from __future__ import annotations

from pathlib import Path

from pix2seq.errors import InputError


def output_folder(path: Path) -> Path:
    """The folder, made where needed. Raises `InputError` where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path} cannot be made ({error.strerror}); give another one") from None
    return path


def output_file(path: Path) -> Path:
    """The file's path, its folder made. Raises `InputError` where a folder has its name."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name, such as {path / 'out.json'}")
    output_folder(path.parent)
    return path
