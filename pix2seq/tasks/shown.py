"""Examples that a user shows: objects of other images, to find all like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pix2seq.errors import InputError

DEFAULT_NAME = "example"


@dataclass(frozen=True)
class Shown:
    """An object in an image, as an example of what is asked for."""

    image: Any  # in any form that `Predictor.encode` takes, or encoded
    box_xyxy: tuple[float, float, float, float]  # in pixels of that image
    name: str = DEFAULT_NAME  # of what it is an example of


def given_examples(like: Any) -> tuple[Shown, ...]:
    """Return what users ask by: an (image, box), a list of them for one kind of object, or such by the kind's name.

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
        raise InputError("an example is (image, (x0, y0, x1, y1)); give one, a list of them, or such by name")
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"an example is (image, (x0, y0, x1, y1)), got {type(pair).__name__}")
        image, box = pair
        try:
            corners = np.asarray(box, np.float64)
        except (ValueError, TypeError, OverflowError, RuntimeError):
            corners = np.zeros(0)
        if corners.shape != (4,) or not np.isfinite(corners).all():
            raise InputError(f"the box of an example is four numbers x0, y0, x1, y1, got {box!r}")
        x0, y0, x1, y1 = corners.tolist()
        found.append(Shown(image, (x0, y0, x1, y1), name))
    return tuple(found)
