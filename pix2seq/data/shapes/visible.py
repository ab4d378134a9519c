"""From a mask on the fine grid back to polygons that cover the same ground."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pix2seq.data.shapes.raster import Ring

TOLERANCE = 0.5  # of a fine pixel: straightens the stairs of a slanted edge and no more


def mask_rings(mask: NDArray[np.bool_], *, min_area: float) -> list[Ring]:
    """Outer rings of a mask (H, W), largest first, with pixel edges at whole numbers.

    COCO's polygons cannot say "hole", so a mask with a hole is cut in two through the hole, and
    each side is traced. Parts and holes of less than `min_area` square pixels are left out.
    """
    rings: list[Ring] = []
    rest = [(mask, 0, 0)]
    while rest:
        piece, top, left = rest.pop()
        outer, holes = trace(piece)
        holes = [hole for hole in holes if cv2.contourArea(hole.astype(np.float32)) >= min_area]
        if not holes:
            rings += [ring + (left, top) for ring in outer if cv2.contourArea(ring.astype(np.float32)) >= min_area]
            continue
        column, row = np.rint((holes[0].min(0) + holes[0].max(0)) / 2).astype(int)
        if np.count_nonzero(piece[:, column]) <= np.count_nonzero(piece[row]):
            rest += [(piece[:, :column], top, left), (piece[:, column:], top, left + int(column))]
        else:
            rest += [(piece[:row], top, left), (piece[row:], top + int(row), left)]
    return sorted(rings, key=lambda ring: -cv2.contourArea(ring.astype(np.float32)))


def trace(mask: NDArray[np.bool_]) -> tuple[list[Ring], list[Ring]]:
    """Outer rings and holes of a mask (H, W).

    `cv2.findContours` runs through the centres of the outermost pixels and so loses half a pixel
    all round. On a grid twice as fine, whose in-between points are set where the mean of the pixels
    around them is at least a half, the same walk passes exactly midway between inside and outside:
    marching squares, without a bias on straight or slanted edges.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    across = padded[:, :-1] | padded[:, 1:]
    down = padded[:-1] | padded[1:]
    grid = np.empty((2 * height + 3, 2 * width + 3), np.uint8)
    grid[::2, ::2] = padded
    grid[::2, 1::2] = across
    grid[1::2, ::2] = down
    # Two or more of four: both columns hold one, or both rows do.
    grid[1::2, 1::2] = (down[:, :-1] & down[:, 1:]) | (across[:-1] & across[1:])
    contours, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer: list[Ring] = []
    holes: list[Ring] = []
    for index, contour in enumerate(contours):
        ring = cv2.approxPolyDP(contour, 2 * TOLERANCE, True)[:, 0]
        if len(ring) >= 3:
            (outer if hierarchy[0, index, 3] < 0 else holes).append(ring.astype(np.float64) / 2 - 0.5)
    return outer, holes


def ring_area(ring: Ring) -> float:
    """Area of a ring (P, 2) in square pixels, whichever way it turns."""
    x, y = ring.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
