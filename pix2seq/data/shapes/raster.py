"""Exact filling of polygons on a fine grid: a pixel belongs to a figure where its centre does.

OpenCV and Pillow also paint the outline, which makes thin limbs visibly fatter than their polygon.
Rings are (P, 2) as x, y; the pixel in row r and column c has its centre at (c + 0.5, r + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]  # (P, 2) as x, y, closed by its first point


def bounds(rings: Sequence[Ring], height: int, width: int) -> tuple[int, int, int, int]:
    """The window (top, left, bottom, right) of whole pixels that holds the rings, cut at the grid's sides."""
    points = np.concatenate(rings)
    left, top = np.floor(points.min(0)).astype(int)
    right, bottom = np.ceil(points.max(0)).astype(int)
    return max(int(top), 0), max(int(left), 0), min(int(bottom), height), min(int(right), width)


def fill(rings: Sequence[Ring], window: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """Pixels of `window` (top, left, bottom, right) inside the union of rings that all turn the same way.

    Scan lines with the nonzero winding rule, so parts that overlap need no polygon union.
    """
    top, left, bottom, right = window
    height, width = bottom - top, right - left
    if height <= 0 or width <= 0:
        return np.zeros((max(height, 0), max(width, 0)), bool)
    start = np.concatenate(rings) - (left, top)
    stop = np.concatenate([np.concatenate((ring[1:], ring[:1])) for ring in rings]) - (left, top)
    low, high = np.minimum(start[:, 1], stop[:, 1]), np.maximum(start[:, 1], stop[:, 1])
    first = np.ceil(low - 0.5).clip(0, height).astype(np.int64)
    after = np.ceil(high - 0.5).clip(0, height).astype(np.int64)
    count = after - first
    edge = np.repeat(np.arange(len(start)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
    delta = stop - start
    slope = delta[:, 0] / np.where(delta[:, 1] == 0, 1.0, delta[:, 1])
    x = start[edge, 0] + (row + 0.5 - start[edge, 1]) * slope[edge]
    column = np.ceil(x - 0.5).clip(0, width).astype(np.int64)
    turns = np.zeros((height, width + 1), np.int8)
    np.add.at(turns.reshape(-1), row * (width + 1) + column, np.where(delta[edge, 1] > 0, 1, -1).astype(np.int8))
    return np.cumsum(turns, axis=1, dtype=np.int8)[:, :width] != 0
