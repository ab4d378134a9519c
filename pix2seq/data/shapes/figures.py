"""Polygons of the plain classes, and exact filling of polygons on a pixel grid.

A polygon is one ring (P, 2) as x, y: upright, centred on its box, longest side 1. y points down, so the
tip of a triangle or an arrow and the lobes of a heart have the smaller y. All rings have the same
orientation. `fill` does not use OpenCV or Pillow because they also paint the edge, which makes thin limbs
visibly fatter than their polygon; here a pixel belongs to a figure if its centre lies inside, and the pixel
in row r and column c has its centre at (c + 0.5, r + 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Ring = NDArray[np.float64]  # (P, 2) as x, y, closed by its first point
Window = tuple[int, int, int, int]  # top, left, bottom, right in whole pixels
CURVE_POINTS = 48  # per full circle: the chord is off by a five-hundredth of the radius


def random_polygon(name: str, rng: Generator) -> Ring:
    """Draw a polygon of class `name` with random proportions."""
    ring = POLYGONS[name](rng)
    low, high = ring.min(0), ring.max(0)
    return (ring - (low + high) / 2) / (high - low).max()


def circle(rng: Generator) -> Ring:
    """A disc."""
    return arc(0, 2 * np.pi, CURVE_POINTS, endpoint=False)


def oval(rng: Generator) -> Ring:
    """An ellipse that is clearly not a circle."""
    return circle(rng) * (1, rng.uniform(0.45, 0.68))


def square(rng: Generator) -> Ring:
    """A square."""
    return np.array([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]])


def rectangle(rng: Generator) -> Ring:
    """A rectangle that is clearly not a square."""
    return square(rng) * (1, rng.uniform(0.35, 0.65))


def triangle(rng: Generator) -> Ring:
    """An isosceles triangle, from flat to steep."""
    return np.array([[0.0, -1.0], [1, 1], [-1, 1]]) * (rng.uniform(0.6, 1.1), 1)


def star(rng: Generator) -> Ring:
    """A star of five points."""
    angles = np.arange(10) * (np.pi / 5) - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.4, 0.52))
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii[:, None]


def cross(rng: Generator) -> Ring:
    """A plus sign."""
    w = rng.uniform(0.26, 0.4)
    return np.array(
        [[-w, -1], [w, -1], [w, -w], [1, -w], [1, w], [w, w], [w, 1], [-w, 1], [-w, w], [-1, w], [-1, -w], [-w, -w]]
    )


def heart(rng: Generator) -> Ring:
    """Two half circles on top of a rounded wedge."""
    t = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((x, -y * rng.uniform(0.9, 1.1)), axis=1)


def arrow(rng: Generator) -> Ring:
    """A shaft and a head, pointing up."""
    shaft, head, neck = rng.uniform(0.14, 0.22), rng.uniform(0.45, 0.62), rng.uniform(-0.25, 0.1)
    return np.array(
        [[0, -1], [head, neck], [shaft, neck], [shaft, 1], [-shaft, 1], [-shaft, neck], [-head, neck]], dtype=float
    )


def moon(rng: Generator) -> Ring:
    """A crescent: a disc minus a shifted disc of the same size."""
    half = np.arccos(rng.uniform(0.22, 0.36))  # the two circles meet at this angle from the shift
    outer = arc(half, 2 * np.pi - half, CURVE_POINTS * 2 // 3)
    inner = arc(np.pi + half, np.pi - half, CURVE_POINTS // 3)[1:-1] + (2 * np.cos(half), 0)
    return np.concatenate((outer, inner))


def arc(start: float, stop: float, points: int, *, endpoint: bool = True) -> Ring:
    """Return points on the unit circle between two angles in radians, clockwise on the screen."""
    angles = np.linspace(start, stop, points, endpoint=endpoint)
    return np.stack((np.cos(angles), np.sin(angles)), axis=1)


POLYGONS: dict[str, Callable[[Generator], Ring]] = {
    "circle": circle,
    "oval": oval,
    "square": square,
    "rectangle": rectangle,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
    "arrow": arrow,
    "moon": moon,
}


def bounds(rings: Sequence[Ring], height: int, width: int) -> Window:
    """Return the window that holds the rings, clipped to the grid."""
    points = np.concatenate(rings)
    left, top = np.floor(points.min(0)).astype(int)
    right, bottom = np.ceil(points.max(0)).astype(int)
    return max(int(top), 0), max(int(left), 0), min(int(bottom), height), min(int(right), width)


def fill(rings: Sequence[Ring], window: Window) -> NDArray[np.bool_]:
    """Mark the pixels of `window` inside the union of rings of the same orientation.

    Uses scan lines with the nonzero winding rule, so overlapping parts need no polygon union.
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
