"""Whether a COCO run-length mask is sound, told without drawing it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_CHARS = 6  # of one count; a longer one would not fit 32 bits
_MAX_COUNT = 2**31


def run_lengths(counts: Any) -> NDArray[np.int64] | None:
    """The run lengths of a COCO RLE's `counts`, a list or compressed as str; None where they are unsound.

    They are sound if all of them are whole, none is negative, and each fits 31 bits: pycocotools may
    end the process on others. Their sum must yet be compared with the image's size.
    """
    if isinstance(counts, str):
        return _uncompress(counts)
    if not isinstance(counts, list):
        return None
    try:
        lengths = np.array(counts if counts else np.zeros(0, np.int64))
    except ValueError:  # lists of unlike lengths
        return None
    if lengths.dtype != np.int64 or lengths.ndim != 1 or ((lengths < 0) | (lengths >= _MAX_COUNT)).any():
        return None
    return lengths


def _uncompress(text: str) -> NDArray[np.int64] | None:
    """Run lengths of a compressed COCO RLE (`rleFrString` of pycocotools' maskApi.c), all counts at once.

    Each is written five bits a character, lowest first, plus 32 where more follow, and all plus 48;
    bit 16 of the last is the sign. From the fourth on, it is the difference to the one before last.
    """
    if not text.isascii():
        return None
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return bits
    last = np.flatnonzero(bits & 32 == 0)  # of each count's characters
    first = np.append(0, last[:-1] + 1)
    if not len(last) or last[-1] != len(bits) - 1 or bits.min() < 0 or bits.max() > 63:
        return None
    sizes = last - first + 1
    if sizes.max() > _MAX_CHARS:
        return None
    place = np.arange(len(bits)) - np.repeat(first, sizes)
    values = np.add.reduceat((bits & 31) << (5 * place), first)
    values -= np.where(bits[last] & 16, np.int64(1) << (5 * sizes), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values if ((values >= 0) & (values < _MAX_COUNT)).all() else None
