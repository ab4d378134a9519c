"""The reward of what is answered to clicks: the IoU after them, and an honest estimate of it.

A quality that is said of an answer is scored by Brier's rule: the best that a model can say is the IoU that it expects.
Half of that, beside the IoU itself, never makes a better box worth less, whatever was said before it. The step that
outlines an object is rewarded by `pix2seq.metrics.mask_reward.mask_iou` alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pix2seq.geometry.boxes import box_iou_xyxy


def box_reward(quality: float, box_xyxy: ArrayLike, true_box_xyxy: ArrayLike | None) -> float:
    """Return the reward of a box (4,) with the quality said of it, 0 to 1: its IoU less half the squared error of that.

    `true_box_xyxy` is None where nothing was clicked on: no box is right there, and only the quality counts. The result
    is at most 1, for the right box with quality 1, and at least -0.5.
    """
    iou = 0.0
    if true_box_xyxy is not None:
        box, true_box = np.asarray(box_xyxy, np.float64)[None], np.asarray(true_box_xyxy, np.float64)[None]
        usable = bool((box[:, 2:] > box[:, :2]).all())
        iou = float(box_iou_xyxy(box, true_box)[0, 0]) if usable else 0.0
    return iou - 0.5 * (quality - iou) ** 2


def rating_reward(quality: float, iou: float) -> float:
    """Return the reward of a rating, 0 to 1: 1 less its squared distance from the IoU that it is about."""
    return 1 - (quality - iou) ** 2
