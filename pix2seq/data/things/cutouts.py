"""Cut-outs: images of single things with an alpha channel. Their names are words: `red-car_01.png` is a red car."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pix2seq.data.image import MAX_PIXELS
from pix2seq.data.image_files import IMAGE_SUFFIXES
from pix2seq.errors import InputError

OPAQUE = 128  # alpha from which a pixel belongs to the thing
MIN_SIDE = 4  # pixels of the part that is not transparent
LARGEST = 512  # pixels of the longer side of a cut-out in memory
MAX_REASONS = 10  # why files are left out; further ones are only counted


@dataclass(frozen=True)
class Cutout:
    """A file that shows one thing. Several files may show things of one name."""

    path: Path
    name: str


def name_of(path: Path) -> str:
    """Return the words of a file's name, without numbers that tell files of one thing apart; may be empty."""
    words = re.sub(r"[\W_]+", " ", path.stem.lower()).strip()
    return re.sub(r"( \d+)+$|^\d+$", "", words)


def find_cutouts(folder: Path) -> list[Cutout]:
    """Return the usable cut-outs below a folder, by path. Each file that is no cut-out is named in a warning.

    Raises `InputError` if there are fewer than two different things.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with images that have an alpha channel, such as PNG")
    found, reasons = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        try:
            if not (name := name_of(path)):
                raise InputError("its name has no word; name it by what it shows")
            read_cutout(path)
            found.append(Cutout(path, name))
        except InputError as error:
            reasons.append(f"{path}: {error}")
    for reason in reasons[:MAX_REASONS]:
        print(f"warning: left out: {reason}", file=sys.stderr)
    if len(reasons) > MAX_REASONS:
        print(f"warning: left out: {len(reasons) - MAX_REASONS} more", file=sys.stderr)
    if len({each.name for each in found}) < 2:
        raise InputError(
            f"{folder} has cut-outs of {len({each.name for each in found})} things; expected images with an alpha "
            f"channel of at least two, and left out {len(reasons)} files"
        )
    return found


@lru_cache(maxsize=256)
def read_cutout(path: Path) -> NDArray[np.uint8]:
    """Read the part of a cut-out that is not transparent, (H, W, 4), at most `LARGEST` pixels a side.

    Raises `InputError` if it cannot be read, has no alpha channel, or shows nothing.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"it has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}")
            if not image.has_transparency_data:
                raise InputError(f"it has no alpha channel (mode {image.mode}); save it as PNG with transparency")
            pixels = np.asarray(image.convert("RGBA"))
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError) as error:
        raise InputError(f"it cannot be read ({error}); save it again") from None
    rows, columns = (np.flatnonzero((pixels[..., 3] >= OPAQUE).any(axis=axis)) for axis in (1, 0))
    if len(rows) < MIN_SIDE or len(columns) < MIN_SIDE:
        raise InputError("it is transparent, or smaller than 4 pixels; cut it out again")
    visible = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return fitted(visible, LARGEST)


def fitted(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Shrink an image (H, W, C) so that its longer side has at most `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def split_names(names: Sequence[str], unseen_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split names, by a seed, in those that training sees and a share of those that it never does; one each at least.

    With a share of 0, all names are seen.
    """
    ordered = sorted(set(names))
    count = min(max(round(unseen_share * len(ordered)), 1), len(ordered) - 1) if unseen_share else 0
    drawn = np.random.default_rng((seed, len(ordered))).permutation(len(ordered))
    unseen = {ordered[i] for i in drawn[:count].tolist()}
    return [name for name in ordered if name not in unseen], sorted(unseen)
