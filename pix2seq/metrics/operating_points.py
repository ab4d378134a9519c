"""Precision, recall and F1 of detections, from COCO's matching of them with the objects.

Shapes: D detections, T thresholds of IoU or OKS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU or OKS, as COCO averages them
SHOWN = {"0.5": 0, "0.75": 5, "0.95": 9}  # those with numbers of their own, as indices into `THRESHOLDS`
MEAN = "0.5:0.95"  # the name of the mean over all


@dataclass(frozen=True)
class Matches:
    """Detections of all images, and whether each is right."""

    image_ids: NDArray[np.int64]  # (D,)
    category_ids: NDArray[np.int64]  # (D,)
    scores: NDArray[np.float64]  # (D,)
    areas: NDArray[np.float64]  # (D,) in square pixels
    is_right: NDArray[np.bool_]  # (T, D) whether it is the one that finds an object
    is_counted: NDArray[np.bool_]  # (T, D) false if it found one that is ignored, such as a crowd
    num_truths: Mapping[int, int]  # objects to find, by category id

    def of(self, category_id: int) -> Matches:
        """Return the detections and objects of one class."""
        own = self.category_ids == category_id
        return Matches(
            self.image_ids[own],
            self.category_ids[own],
            self.scores[own],
            self.areas[own],
            self.is_right[:, own],
            self.is_counted[:, own],
            {category_id: self.num_truths.get(category_id, 0)},
        )


@dataclass(frozen=True)
class Curve:
    """What detections of at least a score achieve, from the highest score to the lowest (C, different ones)."""

    scores: NDArray[np.float64]  # (C,)
    precision: NDArray[np.float64]  # (T, C); 1 where all detections so far are ignored
    recall: NDArray[np.float64]  # (T, C)
    f1: NDArray[np.float64]  # (T, C)


@dataclass(frozen=True)
class OperatingPoint:
    """Detections of at least `threshold`."""

    f1: float
    precision: float | None  # None without a detection
    recall: float
    threshold: float | None  # None without a detection

    def metrics(self, name: str) -> dict[str, float | None]:
        """Return the four numbers as `F1@name`, ..."""
        return {
            f"F1@{name}": self.f1,
            f"precision@{name}": self.precision,
            f"recall@{name}": self.recall,
            f"threshold@{name}": self.threshold,
        }


NOTHING = OperatingPoint(0.0, None, 0.0, None)


def curve(matches: Matches) -> Curve:
    """Return precision, recall and F1 by score; classes share the score. There must be an object to find."""
    order = np.argsort(-matches.scores, kind="stable")
    scores = matches.scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)
    counted = matches.is_counted[:, order]
    right = (matches.is_right[:, order] & counted).cumsum(axis=1)[:, last]
    named = counted.cumsum(axis=1)[:, last]
    num_truths = sum(matches.num_truths.values())
    precision = np.where(named > 0, right / np.maximum(named, 1), 1.0)
    return Curve(scores[last], precision, right / num_truths, 2 * right / (named + num_truths))


def operating_points(matches: Matches) -> dict[str, OperatingPoint | None]:
    """Return the point of the best F1 for each of `SHOWN`, and for the mean over all thresholds of IoU (`MEAN`).

    Of equal ones, the highest score is taken. None stands for undefined: there is no object to find.
    """
    names = [*SHOWN, MEAN]
    if not sum(matches.num_truths.values()):
        return dict.fromkeys(names)
    found = curve(matches)
    if not len(found.scores):
        return dict.fromkeys(names, NOTHING)
    points: dict[str, OperatingPoint | None] = {}
    for name in names:
        rows = [SHOWN[name]] if name in SHOWN else list(range(len(THRESHOLDS)))
        f1 = found.f1[rows].mean(axis=0)
        best = int(f1.argmax())
        points[name] = OperatingPoint(
            float(f1[best]),
            float(found.precision[rows, best].mean()),
            float(found.recall[rows, best].mean()),
            float(found.scores[best]),
        )
    return points


def point_metrics(matches: Matches) -> dict[str, float | None]:
    """Return the numbers of `operating_points` by name: `F1@0.5`, `precision@0.5`, `recall@0.5`, ..."""
    metrics: dict[str, float | None] = {}
    for name, point in operating_points(matches).items():
        metrics |= dict.fromkeys(NOTHING.metrics(name)) if point is None else point.metrics(name)
    return metrics
