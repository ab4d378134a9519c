"""Images and videos named on the command line: files, folders, and patterns such as `photos/*.jpg`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from pix2seq.data.image_files import image_files
from pix2seq.errors import InputError
from pix2seq.infer.outputs import JOURNAL, Outputs

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .ts".split())


def find_inputs(given: Iterable[Path]) -> list[Path]:
    """Return the files that are meant, each once, in the order given; those of folders and patterns are sorted.

    A folder stands for the images and videos in it and below. What `predict` wrote, into any folder, is left out unless
    it is named itself. Raises `InputError` for a folder or pattern without any.
    """
    found: dict[Path, None] = {}
    for path in given:
        if os.path.isdir(path):  # which takes names that are too long, too
            files = _others(path / name for name in image_files(path, also=VIDEO_SUFFIXES))
            if not files:
                raise InputError(f"folder {path} holds no image and no video; name files, or another folder")
        elif glob.has_magic(str(path)) and not os.path.lexists(path):
            matching = (Path(name) for name in glob.glob(str(path), recursive=True))
            files = _others(each for each in matching if os.path.isfile(each))
            if not files:
                raise InputError(f"no file matches {path}; check the pattern")
        else:
            files = [path]
        found |= dict.fromkeys(files)
    return list(found)


def is_video(path: Path) -> bool:
    """Whether a name is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _others(paths: Iterable[Path]) -> list[Path]:
    """Return the paths of files that `predict` did not write, sorted."""
    found = {path.absolute(): path for path in paths}
    folders = {folder for path in found for folder in path.parents}
    own = {path for folder in folders if (folder / JOURNAL).is_file() for path in Outputs(folder).written}
    return sorted(path for absolute, path in found.items() if absolute not in own)
