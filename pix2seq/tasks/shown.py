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

    A place is a box x0, y0, x1, y1, a polygon (P, 2), or a list of the polygons of one object, in pixels. Raises
    `InputError` for anything else.
    """
    if isinstance(like, Mapping):
        return tuple(shown for name, some in like.items() for shown in _of_one_kind(some, name))
    return _of_one_kind(like, DEFAULT_NAME)


def _of_one_kind(like: Any, name: Any) -> tuple[Shown, ...]:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"examples are named by text, got {name!r}")
    pairs = [like] if isinstance(like, tuple) else like
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not len(pairs):
        raise InputError("an example is (image, (x0, y0, x1, y1)); give one, a list of them, or such by name")
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"an example is (image, (x0, y0, x1, y1)), got {type(pair).__name__}")
        image, place = pair
        corners = _numbers(place)
        if corners is not None and corners.shape == (4,):
            x0, y0, x1, y1 = corners.tolist()
            found.append(Shown(image, (x0, y0, x1, y1), name))
            continue
        several = isinstance(place, list | tuple) and (corners is None or corners.ndim == 3)
        rings = [_numbers(ring) for ring in (place if several else [place])]
        usable = [ring for ring in rings if ring is not None and ring.ndim == 2 and ring.shape[1] == 2]
        usable = [ring for ring in usable if len(ring) >= MIN_POINTS]
        if not usable or len(usable) < len(rings):
            raise InputError(
                "an example is shown by a box, four numbers x0, y0, x1, y1, or by a polygon of three or more points "
                f"(x, y); got {place!r:.80}"
            )
        points = np.concatenate(usable)
        (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        found.append(Shown(image, (x0, y0, x1, y1), name, tuple(usable)))
    return tuple(found)


def _numbers(value: Any) -> NDArray[np.float64] | None:
    """Return finite numbers as an array; None if they are not."""
    try:
        numbers = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # ragged, no numbers, a tensor on a GPU
        return None
    return numbers if np.isfinite(numbers).all() else None
