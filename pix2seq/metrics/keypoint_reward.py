"""The reward of keypoints: COCO's object keypoint similarity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def keypoint_similarity(
    points: NDArray[np.floating], true_points: NDArray[np.floating], area: float, sigmas: NDArray[np.floating]
) -> float:
    """Return the OKS, 0 to 1, of points (K, 3), x and y in pixels and visibility, of an object of `area` pixels.

    `sigmas` (K,) are the tolerances of `pix2seq.metrics.coco_ap.keypoint_sigmas`. The mean is over labelled points. A
    point without a position (visibility 0) is like none of them. 0 if no point is labelled.
    """
    labelled = true_points[:, 2] > 0
    if not labelled.any():
        return 0.0
    squared = ((points[:, :2] - true_points[:, :2]) ** 2).sum(1)
    similarity = np.exp(-squared / (2 * (2 * sigmas) ** 2 * (area + np.spacing(1))))
    return float(np.where(points[:, 2] > 0, similarity, 0.0)[labelled].mean())
