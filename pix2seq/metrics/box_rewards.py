"""Rewards of a list of boxes, and what its scores should have been.

Shapes: P predicted boxes, G annotated objects that are no crowds.

Reference: arXiv 2302.08242, and `configs/proj/reward_tune/detection_reward.py` of google-research/big_vision, for
recall with a penalty for duplicates. Classes weigh the same here; there, rare ones of COCO weigh more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from pix2seq.types import Target

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
DUPLICATE_WEIGHT = 0.3
_IOU: Any = mask_utils.iou


def recall_reward(boxes_xyxy: NDArray[np.floating], labels: NDArray[np.integer], target: Target) -> float:
    """Return how many objects boxes (P, 4) of classes (P,) find, less 0.3 for each duplicate, mean over IoUs.

    A box belongs to the object of its class with which it has the largest IoU. The best of these boxes finds the
    object, the others are duplicates. Boxes without an object cost nothing. Between 0 and G, for a list of no
    duplicates.
    """
    ious, same = _ious(boxes_xyxy, target), labels[:, None] == target.labels[~target.iscrowd]
    if not ious.size:
        return 0.0
    rewards = []
    for threshold in IOU_THRESHOLDS:
        belongs, finds = _assign(np.where(same & (ious > threshold), ious, 0.0))
        rewards.append(finds.sum() - DUPLICATE_WEIGHT * (belongs & ~finds).sum())
    return float(np.mean(rewards))


def precision_reward(
    boxes_xyxy: NDArray[np.floating], labels: NDArray[np.integer], scores: NDArray[np.floating], target: Target
) -> float:
    """Return the average precision of boxes (P, 4) with classes and scores (P,) in one image, 0 to 1, mean over IoUs.

    All classes are ranked together. Boxes in the order of their scores each take the object of their class with the
    largest IoU that is free. A false box lowers the precision at every object that is found after it. Boxes in crowds
    do not count. 0 if there is nothing to find.
    """
    order = np.argsort(-scores, kind="stable")
    objects = ~target.iscrowd
    ious, in_crowd = _ious(boxes_xyxy, target)[order], _in_crowd(boxes_xyxy, labels, target)[order]
    same = labels[order, None] == target.labels[objects]
    num_objects = int(objects.sum())
    if not ious.size:
        return 0.0
    total = 0.0
    for threshold in IOU_THRESHOLDS:
        free = np.ones(num_objects, np.bool_)
        num_right = num_counted = 0
        for i in range(len(ious)):
            overlaps = np.where(same[i] & free & (ious[i] >= threshold), ious[i], 0.0)
            best = int(overlaps.argmax())
            if overlaps[best] > 0:
                free[best] = False
                num_right, num_counted = num_right + 1, num_counted + 1
                total += num_right / num_counted
            elif in_crowd[i] < threshold:
                num_counted += 1
    return total / (num_objects * len(IOU_THRESHOLDS))


def true_scores(boxes_xyxy: NDArray[np.floating], target: Target) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the class (P,) that each of boxes (P, 4) should have, 0 for none, and the score (P,): its IoU.

    A box that is not the best of those that belong to an object of any class, by an IoU above 0.5, has no class and
    the score 0.
    """
    ious = _ious(boxes_xyxy, target)
    if not ious.size:
        return np.zeros(len(boxes_xyxy), np.int64), np.zeros(len(boxes_xyxy))
    _, finds = _assign(np.where(ious > IOU_THRESHOLDS[0], ious, 0.0))
    labels = target.labels[~target.iscrowd][ious.argmax(1)]
    return np.where(finds, labels, 0), np.where(finds, ious.max(1), 0.0)


def _assign(ious: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which boxes (P,) belong to an object, and which find it, of IoUs (P, G) that are 0 where none counts."""
    numbers = np.arange(len(ious))
    owner = ious.argmax(1)
    own = ious[numbers, owner]
    belongs = own > 0
    ranks = np.where(owner[:, None] == np.arange(ious.shape[1]), ious, 0.0)
    return belongs, belongs & (ranks.argmax(0)[owner] == numbers)


def _ious(boxes_xyxy: NDArray[np.floating], target: Target) -> NDArray[np.float64]:
    """Return the IoU (P, G) of boxes and objects."""
    return _overlaps(boxes_xyxy, target.boxes_xyxy[~target.iscrowd], crowd=False)


def _in_crowd(boxes_xyxy: NDArray[np.floating], labels: NDArray[np.integer], target: Target) -> NDArray[np.float64]:
    """Return the largest share (P,) of each box that lies in a crowd of its class."""
    shares = _overlaps(boxes_xyxy, target.boxes_xyxy[target.iscrowd], crowd=True)
    same = labels[:, None] == target.labels[target.iscrowd]
    return np.where(same, shares, 0.0).max(1, initial=0.0)


def _overlaps(
    boxes_xyxy: NDArray[np.floating], others_xyxy: NDArray[np.floating], *, crowd: bool
) -> NDArray[np.float64]:
    if not len(boxes_xyxy) or not len(others_xyxy):
        return np.zeros((len(boxes_xyxy), len(others_xyxy)))
    # pycocotools reads memory as rows of x, y, width, height, whatever the order of the array.
    ours, others = (
        np.ascontiguousarray(np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]), np.float64)
        for boxes in (boxes_xyxy, others_xyxy)
    )
    return np.asarray(_IOU(ours, others, [int(crowd)] * len(others)), np.float64)
