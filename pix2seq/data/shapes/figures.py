"""Outlines of the plain classes: one ring each, upright, centred on its box, longest side 1.

y points down, so "upright" means that the tip of a triangle, an arrow or a heart's lobes have the
smaller y. Every ring turns the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from pix2seq.data.shapes.raster import Ring

CURVE_POINTS = 48  # on a whole circle: the chord errs by a five-hundredth of the radius


def outline(name: str, rng: Generator) -> Ring:
    """A ring of class `name`, with its proportions drawn from `rng`."""
    ring = OUTLINES[name](rng)
    low, high = ring.min(0), ring.max(0)
    return (ring - (low + high) / 2) / (high - low).max()


def circle(rng: Generator) -> Ring:
    """A disc."""
    return arc(0, 2 * np.pi, CURVE_POINTS, endpoint=False)


def oval(rng: Generator) -> Ring:
    """An ellipse far enough from a circle that the two are never confused."""
    return circle(rng) * (1, rng.uniform(0.45, 0.68))


def square(rng: Generator) -> Ring:
    """Four equal sides."""
    return np.array([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]])


def rectangle(rng: Generator) -> Ring:
    """Clearly longer than wide."""
    return square(rng) * (1, rng.uniform(0.35, 0.65))


def triangle(rng: Generator) -> Ring:
    """Isosceles, from flat to steep."""
    return np.array([[0.0, -1.0], [1, 1], [-1, 1]]) * (rng.uniform(0.6, 1.1), 1)


def star(rng: Generator) -> Ring:
    """Five points."""
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
    """A crescent: a disc less a disc of the same size beside it."""
    half = np.arccos(rng.uniform(0.22, 0.36))  # the two circles meet at this angle from the shift
    outer = arc(half, 2 * np.pi - half, CURVE_POINTS * 2 // 3)
    inner = arc(np.pi + half, np.pi - half, CURVE_POINTS // 3)[1:-1] + (2 * np.cos(half), 0)
    return np.concatenate((outer, inner))


def arc(start: float, stop: float, points: int, *, endpoint: bool = True) -> Ring:
    """Points on the unit circle from one angle to another, radians, clockwise to the eye."""
    angles = np.linspace(start, stop, points, endpoint=endpoint)
    return np.stack((np.cos(angles), np.sin(angles)), axis=1)


OUTLINES: dict[str, Callable[[Generator], Ring]] = {
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
