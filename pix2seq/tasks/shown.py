"""Examples that a user shows: objects of other images, to find all like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.geometry.polygons import MIN_POINTS

DEFAULT_NAME = "example"


@dataclass(frozen=True)
class Shown:
    """An object in an image, as an example of what is asked for."""

    image: Any  # in any form that `Predictor.encode` takes, or encoded
    box_xyxy: tuple[float, float, float, float]  # in pixels of that image
    name: str = DEFAULT_NAME  # of what it is an example of
    polygons: tuple[NDArray[np.floating], ...] = ()  # rings (P, 2), x, y; () for a box alone


def given_examples(like: Any) -> tuple[Shown, ...]:
    """Return what users ask by: an (image, place), a list of them for one kind of object, or such by the kind's name.

    A place is a box x0, y0, x1, y1, a polygon (P, 2) or (2 P,), or a list of the polygons of one object, in pixels.
    Raises `InputError` for anything else.
    """
    if isinstance(like, Mapping):
        return tuple(shown for name, some in like.items() for shown in _of_one_kind(some, name))
    return _of_one_kind(like, DEFAULT_NAME)


def _of_one_kind(like: Any, name: Any) -> tuple[Shown, ...]:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"examples are named by text, got {name!r}")
    pairs = [like] if isinstance(like, tuple) else like
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not len(pairs):
        raise InputError("an example is (image, box or polygon); give one, a list of them, or such by name")
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"an example is (image, box or polygon), got {type(pair).__name__}")
        image, place = pair
        found.append(_shown(image, place, name))
    return tuple(found)


def _shown(image: Any, place: Any, name: str) -> Shown:
    """Return the example at a place of an image. Raises `InputError` if it is no place."""
    numbers = _numbers(place)
    if numbers is not None and numbers.shape == (4,):
        x0, y0, x1, y1 = numbers.tolist()
        return Shown(image, (x0, y0, x1, y1), name)
    rings = [_ring(numbers)]
    if rings[0] is None and isinstance(place, Sequence | np.ndarray) and not isinstance(place, str):
        rings = [_ring(_numbers(each)) for each in place]
    usable = tuple(ring for ring in rings if ring is not None)
    if not usable or len(usable) < len(rings):
        raise InputError(
            "an example is shown by a box, four numbers x0, y0, x1, y1, or by a polygon of three or more points "
            f"(x, y), or a list of such; got {place!r:.80}"
        )
    points = np.concatenate(usable)
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return Shown(image, (x0, y0, x1, y1), name, usable)


def _ring(numbers: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Return points (P, 2) from those, or from x, y, x, y, ... in a row as in COCO files; None if it is no ring."""
    if numbers is None or not numbers.size:
        return None
    if numbers.ndim == 1 and len(numbers) % 2 == 0:
        numbers = numbers.reshape(-1, 2)
    return numbers if numbers.ndim == 2 and numbers.shape[1] == 2 and len(numbers) >= MIN_POINTS else None


def _numbers(value: Any) -> NDArray[np.float64] | None:
    """Return finite numbers as an array; None if they are not."""
    try:
        numbers = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # ragged, no numbers, a tensor on a GPU
        return None
    return numbers if np.isfinite(numbers).all() else None
