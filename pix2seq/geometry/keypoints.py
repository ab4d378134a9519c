"""Keypoints: the order of a skeleton's points after a mirror."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mirror_order(names: Sequence[str]) -> NDArray[np.int64]:
    """Return indices (K,) that put mirrored keypoints back under their names: `left_eye` and `right_eye` swap.

    Names without a counterpart, such as `nose`, stay.
    """
    swapped = {"left": "right", "right": "left"}
    index = {name: position for position, name in enumerate(names)}
    order = []
    for position, name in enumerate(names):
        side, _, part = name.partition("_")
        order.append(index.get(f"{swapped.get(side, side)}_{part}", position))
    return np.array(order, np.int64)
