"""Boxes as (..., 4) arrays; names say the format: `xyxy` and `yxyx` are corners."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


def box_xyxy_to_yxyx(boxes: FloatArray) -> FloatArray:
    """Swap x and y of both corners; its own inverse."""
    return boxes[..., [1, 0, 3, 2]]


def box_area(boxes: FloatArray) -> FloatArray:
    """Return the areas (...,) of `xyxy` or `yxyx` boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip_boxes_xyxy(boxes: FloatArray, width: float, height: float) -> FloatArray:
    """Move corners into [0, width] x [0, height]; a box that lies outside becomes empty."""
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def padded_region(box_xyxy: FloatArray, width: int, height: int, padding: float) -> tuple[int, int, int, int]:
    """Return the region of an image around a box as x0, y0, x1, y1 in whole pixels, the last ones excluded.

    `padding` is the share of the box's size to keep on each side. Reference: google-research/pix2seq,
    `data/data_utils.py` (`maybe_unbatch_instances_and_crop_image_to_bbox`).
    """
    size = np.array([width, height], np.float32)
    corners = np.asarray(box_xyxy, np.float32).reshape(2, 2) / size * (size - 1)
    first, last = np.floor(corners[0]).astype(int), np.ceil(corners[1]).astype(int)
    margin = ((last - first + 1) * np.float32(padding)).astype(int)
    x0, y0 = np.maximum(first - margin, 0).tolist()
    x1, y1 = np.minimum(last + margin + 1, [width, height]).tolist()
    return x0, y0, x1, y1


def intersects_xyxy(box: FloatArray, boxes: FloatArray) -> NDArray[np.bool_]:
    """Return which of boxes (N, 4) share a point with one box (4,)."""
    return np.asarray(((boxes[:, :2] <= box[2:]) & (boxes[:, 2:] >= box[:2])).all(axis=1))


def box_iou_xyxy(one: FloatArray, other: FloatArray) -> FloatArray:
    """Return the intersection over union (N, M) of boxes (N, 4) and (M, 4); 0 where both have no area."""
    first = np.maximum(one[:, None, :2], other[None, :, :2])
    last = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.maximum(last - first, 0).prod(axis=2)
    union = box_area(one)[:, None] + box_area(other)[None] - shared
    return shared / np.maximum(union, np.finfo(np.float64).tiny)
