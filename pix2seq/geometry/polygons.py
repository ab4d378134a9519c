"""Polygons and masks: draw rings, trace masks, read RLEs, simplify and clip rings.

A ring is a closed polygon (P, 2) in pixels, x to the right and y down; its last point joins the
first. The left edge of the first column is 0.0, so pixel centres lie at halves. A list of rings is
the union of their insides, as in COCO. Shapes use H rows, W columns and P points.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_POINTS = 3  # of a ring; fewer enclose no area

_MAX_DISTANCE = 16384.0  # pixels outside the image
_MAX_COUNT_CHARS = 6  # of a count in a compressed RLE; longer ones exceed 32 bits
_MAX_COUNT = 2**31


def rasterize(rings_xy: Sequence[NDArray[np.floating]], height: int, width: int) -> NDArray[np.bool_]:
    """Draw the mask (H, W) of the union of rings with pycocotools. Never raises, for any rings.

    pycocotools reads two points as a box, and crashes the process if a coordinate is not finite
    or too large. So points that are not finite are left out, then rings of fewer than 3 points;
    points more than 16384 pixels outside the image are moved to that distance.
    """
    from pycocotools import mask as mask_utils  # here, because tokenizers import this module and need NumPy only

    coder: Any = mask_utils  # pycocotools accepts more than its stubs say
    flat = []
    for ring in rings_xy:
        points = np.asarray(ring, np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) >= MIN_POINTS:
            far = np.array([width, height]) + _MAX_DISTANCE
            flat.append(np.clip(points, -_MAX_DISTANCE, far).ravel().tolist())
    if not flat or not height or not width:
        return np.zeros((height, width), np.bool_)
    return coder.decode(coder.merge(coder.frPyObjects(flat, height, width))).astype(np.bool_)


def mask_to_rings(mask: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Trace a mask (H, W) along the edges of its pixels, one ring for each 4-connected region.

    Rings hold only corners, as whole numbers, clockwise on the screen from the topmost and then
    leftmost one, and are ordered by that corner. Holes are dropped: a list of rings cannot hold them.
    """
    inside = np.pad(np.asarray(mask, np.bool_), 1)
    # The four pixels around lattice point (y, x); pixel (y, x) is its lower right.
    upper_left, upper_right = inside[:-1, :-1], inside[:-1, 1:]
    lower_left, lower_right = inside[1:, :-1], inside[1:, 1:]
    y, x = np.nonzero(upper_left ^ upper_right ^ lower_left ^ lower_right)
    # Where two pixels touch in a point, each has a corner.
    falling = np.argwhere(upper_left & lower_right & ~upper_right & ~lower_left)
    rising = np.argwhere(upper_right & lower_left & ~upper_left & ~lower_right)
    touching = np.concatenate([falling, falling, rising, rising])
    y, x = np.concatenate([y, touching[:, 0]]), np.concatenate([x, touching[:, 1]])
    num_simple = len(y) - len(touching)
    # Of such a pair, 0 comes first: the left pixel's corner along the row, the upper pixel's along the column.
    in_row = np.zeros(len(y), np.int64)
    in_row[num_simple:] = np.repeat([0, 1, 0, 1], np.repeat([len(falling), len(rising)], 2))
    in_column = np.zeros(len(y), np.int64)
    in_column[num_simple:] = np.repeat([0, 1, 1, 0], np.repeat([len(falling), len(rising)], 2))

    # Join the corners of each row in pairs from left to right, and those of each column from top to bottom.
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
    """Trace a COCO RLE as `mask_to_rings` does; `counts` is a list, or compressed as str or bytes.

    Raises `ValueError` if the counts do not fill `size` (height, width).
    """
    return mask_to_rings(rle_to_mask(rle))


def rle_to_mask(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """Decode a COCO RLE to a mask (H, W); see `rle_to_rings`.

    pycocotools is not used: it leaves a mask of too few counts uninitialised, and may crash the
    process if `counts` is not a compressed RLE.
    """
    height, width = (int(size) for size in rle["size"])
    counts = rle["counts"]
    lengths = run_lengths(counts.decode("latin-1") if isinstance(counts, bytes) else counts)
    if lengths is None:
        raise ValueError("RLE counts must be whole numbers from 0, or a compressed string of them")
    if lengths.sum() != height * width:
        raise ValueError(f"RLE counts add up to {lengths.sum()}; size {height} x {width} needs {height * width}")
    # Runs go down the columns and start with the background.
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def run_lengths(counts: Any) -> NDArray[np.int64] | None:
    """Return the run lengths of a COCO RLE's `counts`, a list or a compressed str; None if they are not valid.

    Valid counts are whole, not negative and below 2**31; on others pycocotools may crash the process.
    The caller still has to compare their sum with the size of the image.
    """
    if isinstance(counts, str):
        return _uncompress(counts)
    if not isinstance(counts, list):
        return None
    try:
        lengths = np.array(counts if counts else np.zeros(0, np.int64))
    except ValueError:  # nested lists of different lengths
        return None
    if lengths.dtype != np.int64 or lengths.ndim != 1 or ((lengths < 0) | (lengths >= _MAX_COUNT)).any():
        return None
    return lengths


def space_evenly(rings_xy: Sequence[NDArray[np.floating]], num_points: int) -> list[NDArray[np.float64]]:
    """Replace the points of rings by about `num_points` in all, at equal distances along each ring.

    Rings get points in proportion to their lengths, 4 at least. They run clockwise on the screen from their topmost
    and then leftmost point, the topmost ring first, so that a mask has one way to be written.
    """
    turned = []
    for ring in rings_xy:
        points = np.asarray(ring, np.float64)
        if ring_area(points) < 0:
            points = points[::-1]
        turned.append(np.roll(points, -int(np.lexsort((points[:, 0], points[:, 1]))[0]), axis=0))
    turned.sort(key=lambda points: (points[0, 1], points[0, 0]))
    lengths = [np.hypot(*(np.roll(points, -1, axis=0) - points).T) for points in turned]
    total = sum(each.sum() for each in lengths)
    spaced = []
    for points, steps in zip(turned, lengths, strict=True):
        if not steps.sum():
            continue
        number = max(round(num_points * steps.sum() / total), 4)
        along = np.append(0, np.cumsum(steps))
        wanted = np.arange(number) * (along[-1] / number)
        closed = np.append(points, points[:1], axis=0)
        spaced.append(np.stack([np.interp(wanted, along, closed[:, axis]) for axis in (0, 1)], axis=1))
    return spaced


def simplify_rings(
    rings_xy: Sequence[NDArray[np.floating]], max_points: int, *, gap: int = 0
) -> list[NDArray[np.floating]]:
    """Reduce rings to at most `max_points` points in total, where each gap between two rings counts `gap` points.

    Repeatedly removes the point that forms the smallest triangle with its two neighbours, over all
    rings (Visvalingam and Whyatt, "Line generalisation by repeated elimination of points", 1993),
    so the area changes little. A ring of 3 points is removed at once; it is ranked by its area per
    freed point, so rings without area go first. The remaining points keep their order. Rings of
    fewer than 3 points are dropped; if the others fit already, copies of them are returned. The
    order of removal does not depend on the unit of the coordinates.
    """
    rings = [ring for ring in rings_xy if len(ring) >= MIN_POINTS]
    excess = sum(len(ring) for ring in rings) + gap * (len(rings) - 1) - max_points
    if excess <= 0:
        return [ring.copy() for ring in rings]

    points = [(float(x), float(y)) for ring in rings for x, y in ring]
    owner = [number for number, ring in enumerate(rings) for _ in ring]
    num_left = [len(ring) for ring in rings]
    before, after = list(range(-1, len(points) - 1)), list(range(1, len(points) + 1))
    start = 0
    for ring in rings:
        before[start], after[start + len(ring) - 1] = start + len(ring) - 1, start
        start += len(ring)
    version = [0] * len(points)  # a heap entry is valid only if it is its point's latest; -1 once removed

    def entry(point: int) -> tuple[float, int, int]:
        (ax, ay), (bx, by), (cx, cy) = points[before[point]], points[point], points[after[point]]
        cost = abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
        if num_left[owner[point]] == MIN_POINTS:
            cost /= MIN_POINTS + gap
        return cost, version[point], point

    heap = [entry(point) for point in range(len(points))]
    heapq.heapify(heap)
    while excess > 0:
        _, entry_version, point = heapq.heappop(heap)
        if entry_version != version[point]:
            continue
        number, previous, following = owner[point], before[point], after[point]
        if num_left[number] == MIN_POINTS:
            version[point] = version[previous] = version[following] = -1
            excess -= MIN_POINTS + gap
            continue
        version[point] = -1
        num_left[number] -= 1
        excess -= 1
        after[previous], before[following] = following, previous
        for neighbour in (previous, following):
            version[neighbour] += 1
            heapq.heappush(heap, entry(neighbour))
    kept = np.split(np.array(version) >= 0, np.cumsum([len(ring) for ring in rings])[:-1])
    return [ring[keep] for ring, keep in zip(rings, kept, strict=True) if keep.any()]


def clip_rings(rings_xy: Sequence[NDArray[np.floating]], width: float, height: float) -> list[NDArray[np.float64]]:
    """Cut rings to [0, width] x [0, height]; rings that lie outside are left out.

    A ring gets new points where it crosses the image's edge (Sutherland and Hodgman, 1974);
    moving its outside points onto the edge instead would tilt the segments that cross it. If the
    edge splits a ring into parts, they stay one ring, joined along that edge.
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
    """Return the signed area of a ring (P, 2): positive if it runs clockwise on the screen (x, y with y down)."""
    points = np.asarray(ring, np.float64)
    ahead = np.roll(points, -1, axis=0)
    return float((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum() / 2)


def _clip_below(ring: NDArray[np.float64], axis: int, limit: float) -> NDArray[np.float64]:
    """Cut a ring (P, 2) where its coordinate `axis` exceeds `limit`."""
    beyond = ring[:, axis] - limit
    outside = beyond > 0
    if not outside.any():
        return ring
    ahead, beyond_ahead = np.roll(ring, -1, axis=0), np.roll(beyond, -1)
    crosses = outside != np.roll(outside, -1)
    share = beyond / np.where(crosses, beyond - beyond_ahead, 1.0)
    crossings = ring + (ahead - ring) * share[:, None]
    crossings[:, axis] = limit  # exactly
    # Interleave each point with its edge's crossing, then keep the inside points and the real crossings.
    return np.stack([ring, crossings], axis=1)[np.stack([~outside, crosses], axis=1)]


def _partners(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the other corner of each pair, where entries 2 i and 2 i + 1 of `order` are a pair."""
    partners = np.empty_like(order)
    partners[order[0::2]] = order[1::2]
    partners[order[1::2]] = order[0::2]
    return partners


def _uncompress(text: str) -> NDArray[np.int64] | None:
    """Decode a compressed COCO RLE (`rleFrString` of pycocotools' maskApi.c) to run lengths, all counts at once.

    Each character holds five bits of a count, lowest first, plus 32 if more follow, plus 48; bit 16
    of the last one is the sign. From the fourth on, a count is the difference to the one before last.
    """
    if not text.isascii():
        return None
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return bits
    last = np.flatnonzero(bits & 32 == 0)  # character of each count
    first = np.append(0, last[:-1] + 1)
    if not len(last) or last[-1] != len(bits) - 1 or bits.min() < 0 or bits.max() > 63:
        return None
    sizes = last - first + 1
    if sizes.max() > _MAX_COUNT_CHARS:
        return None
    position = np.arange(len(bits)) - np.repeat(first, sizes)
    values = np.add.reduceat((bits & 31) << (5 * position), first)
    values -= np.where(bits[last] & 16, np.int64(1) << (5 * sizes), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values if ((values >= 0) & (values < _MAX_COUNT)).all() else None
