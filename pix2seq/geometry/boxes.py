"""Boxes, (..., 4) arrays in named formats: `xyxy` and `yxyx` are corners, `xywh` is corner and size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


def box_xyxy_to_yxyx(boxes: FloatArray) -> FloatArray:
    """Swap x and y of both corners; its own inverse."""
    return boxes[..., [1, 0, 3, 2]]


def box_xyxy_to_xywh(boxes: FloatArray) -> FloatArray:
    """Corners to x, y, width, height."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def box_xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """x, y, width, height to corners."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def box_area(boxes: FloatArray) -> FloatArray:
    """Areas (...,) of `xyxy` or `yxyx` boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip_boxes_xyxy(boxes: FloatArray, width: float, height: float) -> FloatArray:
    """Corners moved into [0, width] x [0, height]; a box wholly outside becomes empty."""
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))
