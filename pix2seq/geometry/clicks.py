"""Clicks as people give them: in the middle of an object, then in the middle of what an answer got wrong.

Masks are (H, W) bool. A click is x, y in pixels of the mask, at the middle of one of them.
Reference for the clicker and its share of random clicks: RITM, arXiv 2102.06583.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

MIN_DEPTH = 0.5  # share of the largest distance to the edge that a random click keeps at least


@dataclass(frozen=True)
class Click:
    """A click in a mask: whether what lies there belongs to the object."""

    x: float
    y: float
    positive: bool


def first_click(truth: Mask, rng: np.random.Generator | None = None) -> Click:
    """Return a click inside an object, which must have a pixel: at its deepest point, or near it with `rng`."""
    x, y = _inner_point(_depths(truth), rng)
    return Click(x, y, True)


def next_click(
    truth: Mask, answer: Mask, clicks: Sequence[Click] = (), rng: np.random.Generator | None = None
) -> Click | None:
    """Return a click on what is missing or too much in `answer`, whichever is deeper; None if nothing is wrong.

    Pixels that were clicked before are left out. With `rng`, the click is near the deepest point, otherwise at it.
    """
    missing, extra = truth & ~answer, answer & ~truth
    for click in clicks:
        missing[int(click.y), int(click.x)] = extra[int(click.y), int(click.x)] = False
    depths = {True: _depths(missing), False: _depths(extra)}
    positive = bool(depths[True].max() >= depths[False].max())
    if not depths[positive].any():
        return None
    x, y = _inner_point(depths[positive], rng)
    return Click(x, y, positive)


def mask_iou(one: Mask, other: Mask) -> float:
    """Return the intersection over union of two masks; 1 if both are empty."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def disturb(truth: Mask, others: Sequence[Mask], strength: float, rng: np.random.Generator) -> Mask:
    """Return a mask with mistakes that models make: a blurred edge, a part left out, a piece of a neighbour.

    `strength` from 0 to 1 grows the mistakes. `others` are masks that could be meant as well.
    """
    mask = truth
    if rng.random() < 0.6 * strength:
        mask = _without_side(mask, rng)
    if others and rng.random() < 0.5 * strength:
        mask = mask | others[int(rng.integers(len(others)))]
    if rng.random() < 0.3 * strength:
        mask = _hull(mask)
    return _warp(mask, strength * rng.uniform(0.02, 0.12), rng)


def _depths(region: Mask) -> NDArray[np.float32]:
    """Return the distance (H, W) of each pixel to the nearest one outside a region; beyond the image is outside."""
    import cv2  # here, because tokenizers import this package and need NumPy only

    padded = np.pad(region, 1).astype(np.uint8)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1].astype(np.float32)


def _inner_point(depths: NDArray[np.float32], rng: np.random.Generator | None) -> tuple[float, float]:
    """Return the middle x, y of the deepest pixel, or of a random one of those more than half as deep."""
    if rng is None:
        index = int(depths.argmax())
    else:
        inner = np.flatnonzero(depths > MIN_DEPTH * depths.max())
        index = int(inner[rng.integers(len(inner))])
    y, x = divmod(index, depths.shape[1])
    return x + 0.5, y + 0.5


def _without_side(mask: Mask, rng: np.random.Generator) -> Mask:
    """Cut a mask along a random line through one of its pixels, and keep the larger side."""
    inside = np.flatnonzero(mask)
    if not len(inside):
        return mask
    y0, x0 = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.indices(mask.shape)
    side = (columns - x0) * np.cos(angle) + (rows - y0) * np.sin(angle) > 0
    one, other = mask & side, mask & ~side
    return one if np.count_nonzero(one) > np.count_nonzero(other) else other


def _hull(mask: Mask) -> Mask:
    import cv2

    points = np.argwhere(mask)[:, ::-1].astype(np.int32)
    filled = mask.astype(np.uint8, order="C")
    if len(points):
        cv2.fillConvexPoly(filled, cv2.convexHull(points), 1)
    return filled.astype(np.bool_)


def _warp(mask: Mask, amount: float, rng: np.random.Generator) -> Mask:
    """Move the pixels of a mask along a smooth random field, by about `amount` of the mask's side."""
    import cv2

    height, width = mask.shape
    cells = int(rng.integers(3, 8))
    field = rng.standard_normal((2, cells, cells)).astype(np.float32) * np.float32(amount * max(height, width) / 2)
    moves = [cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in field]
    rows, columns = np.indices(mask.shape, dtype=np.float32)
    moved = cv2.remap(mask.astype(np.uint8), columns + moves[0], rows + moves[1], cv2.INTER_NEAREST)
    return moved.astype(np.bool_)
