"""Polygons and masks: rings to masks, masks to rings, and rings of fewer points.

A ring is a closed outline (P, 2) in pixels, x to the right and y down; the left edge of the first
column is 0.0, so pixel centres lie at halves, and the last point is joined to the first. A list of
rings is the union of their insides, as in COCO. Shapes use H rows, W columns and P points.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from pix2seq.geometry.run_lengths import run_lengths

MIN_POINTS = 3  # of a ring; fewer enclose nothing

# pycocotools takes more than its stubs say.
_FR_PY_OBJECTS: Any = mask_utils.frPyObjects
_MERGE: Any = mask_utils.merge
_DECODE: Any = mask_utils.decode
_FAR = 16384.0  # pixels outside the image


def rasterize(rings_xy: Sequence[NDArray[np.floating]], height: int, width: int) -> NDArray[np.bool_]:
    """The mask (H, W) of the rings' union, drawn by pycocotools. Never raises, whatever the rings.

    pycocotools takes two points for a box, and ends the process where a coordinate is not finite
    or too large. So points that are not finite are left out, then rings of fewer than 3 points;
    points more than 16384 pixels outside the image are moved to that distance.
    """
    flat = []
    for ring in rings_xy:
        points = np.asarray(ring, np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) >= MIN_POINTS:
            flat.append(np.clip(points, -_FAR, np.array([width, height]) + _FAR).ravel().tolist())
    if not flat or not height or not width:
        return np.zeros((height, width), np.bool_)
    return _DECODE(_MERGE(_FR_PY_OBJECTS(flat, height, width))).astype(np.bool_)


def mask_to_rings(mask: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Outlines of a mask (H, W) along the edges of its pixels, one ring for each 4-connected region.

    Rings hold corners only, in integers, clockwise as seen on the screen, from the topmost and then
    leftmost one, and are ordered by that corner. Holes are dropped: no list of rings has them.
    """
    inside = np.pad(np.asarray(mask, np.bool_), 1)
    # Around the lattice point (y, x), with pixel (y, x) at its lower right.
    upper_left, upper_right = inside[:-1, :-1], inside[:-1, 1:]
    lower_left, lower_right = inside[1:, :-1], inside[1:, 1:]
    y, x = np.nonzero(upper_left ^ upper_right ^ lower_left ^ lower_right)
    # Two pixels that touch in a point have a corner there each.
    falling = np.argwhere(upper_left & lower_right & ~upper_right & ~lower_left)
    rising = np.argwhere(upper_right & lower_left & ~upper_left & ~lower_right)
    touching = np.concatenate([falling, falling, rising, rising])
    y, x = np.concatenate([y, touching[:, 0]]), np.concatenate([x, touching[:, 1]])
    num_simple = len(y) - len(touching)
    # Of such a pair, 0 comes first: along the row the left pixel's corner, along the column the upper one's.
    in_row = np.zeros(len(y), np.int64)
    in_row[num_simple:] = np.repeat([0, 1, 0, 1], np.repeat([len(falling), len(rising)], 2))
    in_column = np.zeros(len(y), np.int64)
    in_column[num_simple:] = np.repeat([0, 1, 1, 0], np.repeat([len(falling), len(rising)], 2))

    # Corners of a row (of a column) are joined in pairs, from left to right (from top to bottom).
    by_row = np.lexsort((in_row, x, y))
    along_row = _partners(by_row).tolist()
    along_column = _partners(np.lexsort((in_column, y, x))).tolist()
    seen = bytearray(len(y))
    rings = []
    for first in by_row.tolist():
        if seen[first]:
            continue
        corners = []
        corner = first
        while not seen[corner]:
            beside = along_row[corner]
            seen[corner] = seen[beside] = 1
            corners += [corner, beside]
            corner = along_column[beside]
        if lower_right[y[first], x[first]]:  # a hole starts below or right of its region
            rings.append(np.stack([x[corners], y[corners]], axis=1).astype(np.float32))
    return rings


def rle_to_rings(rle: dict[str, Any]) -> list[NDArray[np.float32]]:
    """Outlines, as `mask_to_rings`, of a COCO RLE; `counts` is a list, or compressed as str or bytes.

    Raises `ValueError` where the counts do not fill `size` (height, width).
    """
    return mask_to_rings(rle_to_mask(rle))


def rle_to_mask(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """The mask (H, W) of a COCO RLE; see `rle_to_rings`.

    Not by pycocotools, which leaves a mask of too few counts uninitialised, and may end the process
    where `counts` is no compressed RLE.
    """
    height, width = (int(size) for size in rle["size"])
    counts = rle["counts"]
    lengths = run_lengths(counts.decode("latin-1") if isinstance(counts, bytes) else counts)
    if lengths is None:
        raise ValueError("RLE counts are neither whole numbers from 0 nor a compressed string of them")
    if lengths.sum() != height * width:
        raise ValueError(f"RLE counts add up to {lengths.sum()}; size {height} x {width} needs {height * width}")
    # Runs go down the columns, background first.
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def simplify_rings(
    rings_xy: Sequence[NDArray[np.floating]], max_points: int, *, gap: int = 0
) -> list[NDArray[np.floating]]:
    """Rings of at most `max_points` points in all, counting `gap` more between two of them.

    Removes the point whose triangle with its two neighbours is smallest, over all rings, as often
    as needed (Visvalingam and Whyatt, "Line generalisation by repeated elimination of points",
    1993), so that the area changes little. A ring keeps 3 points or goes altogether, by its area
    for each point that this frees: those without area go first. The points that stay keep their
    order, and a copy of rings that are small enough is returned as it is, less those of fewer than
    3 points. The order of removal, by area, is the same in any units.
    """
    rings = [ring for ring in rings_xy if len(ring) >= MIN_POINTS]
    excess = sum(len(ring) for ring in rings) + gap * (len(rings) - 1) - max_points
    if excess <= 0:
        return [ring.copy() for ring in rings]

    points = [(float(x), float(y)) for ring in rings for x, y in ring]
    owner = [number for number, ring in enumerate(rings) for _ in ring]
    left = [len(ring) for ring in rings]
    before, after = list(range(-1, len(points) - 1)), list(range(1, len(points) + 1))
    start = 0
    for ring in rings:
        before[start], after[start + len(ring) - 1] = start + len(ring) - 1, start
        start += len(ring)
    version = [0] * len(points)  # an entry of the heap counts only if it is a point's latest; -1 once removed

    def entry(point: int) -> tuple[float, int, int]:
        (ax, ay), (bx, by), (cx, cy) = points[before[point]], points[point], points[after[point]]
        cost = abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
        if left[owner[point]] == MIN_POINTS:
            cost /= MIN_POINTS + gap
        return cost, version[point], point

    heap = [entry(point) for point in range(len(points))]
    heapq.heapify(heap)
    while excess > 0:
        _, its_version, point = heapq.heappop(heap)
        if its_version != version[point]:
            continue
        number, previous, following = owner[point], before[point], after[point]
        if left[number] == MIN_POINTS:
            version[point] = version[previous] = version[following] = -1
            excess -= MIN_POINTS + gap
            continue
        version[point] = -1
        left[number] -= 1
        excess -= 1
        after[previous], before[following] = following, previous
        for neighbour in (previous, following):
            version[neighbour] += 1
            heapq.heappush(heap, entry(neighbour))
    kept = np.split(np.array(version) >= 0, np.cumsum([len(ring) for ring in rings])[:-1])
    return [ring[keep] for ring, keep in zip(rings, kept, strict=True) if keep.any()]


def clip_rings(rings_xy: Sequence[NDArray[np.floating]], width: float, height: float) -> list[NDArray[np.float64]]:
    """The part of each ring inside [0, width] x [0, height]; rings wholly outside are left out.

    Where a ring enters and leaves the image, it gets new points (Sutherland and Hodgman, 1974);
    moving the points outside to the border instead would tilt the edges that cross it. Parts that
    the image's edge cuts asunder stay one ring, joined along that edge.
    """
    clipped = []
    for ring in rings_xy:
        points = np.asarray(ring, np.float64).reshape(-1, 2)
        for axis, size in ((0, width), (1, height)):
            points = _clip_below(points, axis, size)
            points = _clip_below(points * -1, axis, 0.0) * -1
        if len(points) >= MIN_POINTS:
            clipped.append(points)
    return clipped


def ring_area(ring: NDArray[np.floating]) -> float:
    """Signed area of a ring (P, 2): positive where it runs clockwise on the screen (x, y with y down)."""
    points = np.asarray(ring, np.float64)
    ahead = np.roll(points, -1, axis=0)
    return float((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum() / 2)


def _clip_below(ring: NDArray[np.float64], axis: int, limit: float) -> NDArray[np.float64]:
    """A ring (P, 2) cut where its coordinate `axis` exceeds `limit`."""
    beyond = ring[:, axis] - limit
    outside = beyond > 0
    if not outside.any():
        return ring
    ahead, beyond_ahead = np.roll(ring, -1, axis=0), np.roll(beyond, -1)
    crosses = outside != np.roll(outside, -1)
    share = beyond / np.where(crosses, beyond - beyond_ahead, 1.0)
    crossings = ring + (ahead - ring) * share[:, None]
    crossings[:, axis] = limit  # exactly
    # Behind every point comes its edge's crossing; of either, what is needed.
    return np.stack([ring, crossings], axis=1)[np.stack([~outside, crosses], axis=1)]


def _partners(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other corner of each pair, where entries 2 i and 2 i + 1 of `order` are a pair."""
    partners = np.empty_like(order)
    partners[order[0::2]] = order[1::2]
    partners[order[1::2]] = order[0::2]
    return partners
