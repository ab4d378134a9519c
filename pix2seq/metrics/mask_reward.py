"""The reward of a mask: its IoU with the annotated one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.polygons import rasterize


def mask_iou(
    rings_xy: Sequence[NDArray[np.floating]], true_rings_xy: Sequence[NDArray[np.floating]], size: tuple[int, int]
) -> float:
    """Return the IoU, 0 to 1, of two masks, each the union of rings (P, 2) in pixels of an input of `size`.

    `size` is height and width. Parts beyond the input do not count. Two empty masks have the IoU 0.
    """
    mask, true_mask = rasterize(rings_xy, *size), rasterize(true_rings_xy, *size)
    union = np.count_nonzero(mask | true_mask)
    return float(np.count_nonzero(mask & true_mask) / union) if union else 0.0
