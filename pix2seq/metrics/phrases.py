"""How well phrases are answered: the box of what a phrase names, whether there is any, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.boxes import box_area, box_iou_xyxy
from pix2seq.metrics.correlation import matthews
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.types import Category, ImageRecord, Instance, Target

GOOD = 0.5  # IoU
NAMED = Category(1, 1, "named")
PRESENCE = ("presence_MCC", "empty_where_absent")  # of phrases that name nothing, too


@dataclass(frozen=True)
class Asked:
    """A phrase, and the boxes (N, 4) that it names, where that is known."""

    text: str
    boxes_xyxy: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    is_unseen: bool = False  # training left such phrases out


@dataclass(frozen=True)
class Found:
    """The answer to a phrase: all boxes (N, 4), best first, with the probability (N,) that each is named."""

    asked: Asked
    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float32]
    min_score: float  # from which a box counts as an answer

    @property
    def count(self) -> int:
        """Objects that were said to be there."""
        return int((self.scores >= self.min_score).sum())


class PhraseMetric(Metric):
    """Scores answers to phrases, and those to phrases that training left out apart, where there are such."""

    def __init__(self) -> None:
        self.found: list[Found] = []

    def add(self, target: Target, answers: Sequence[Found]) -> None:
        """See `Metric`."""
        self.found += answers

    def merge(self, other: PhraseMetric) -> None:
        """See `Metric`."""
        self.found += other.found

    def result(self) -> Scores:
        """See `Metric`."""
        unseen = [each for each in self.found if each.asked.is_unseen]
        scores = scores_of(self.found)
        if unseen:
            # Without phrases that name nothing, as it cannot be said of all whether training left them out.
            seen = [each for each in self.found if not each.asked.is_unseen and len(each.asked.boxes_xyxy)]
            for name, some in (("seen", seen), ("unseen", unseen)):
                scores |= {f"{name}/{key}": value for key, value in scores_of(some).items() if key not in PRESENCE}
        return Scores(scores)


def scores_of(found: Sequence[Found]) -> dict[str, float | None]:
    """Return the share of phrases for one object of which the best box fits, and the scores of boxes and counts."""
    single = [each for each in found if len(each.asked.boxes_xyxy) == 1]
    right = [len(each.boxes_xyxy) > 0 and _iou(each) >= GOOD for each in single]
    true = np.array([len(each.asked.boxes_xyxy) for each in found], np.int64)
    said = np.array([each.count for each in found], np.int64)
    return {
        "Acc@0.5": _mean(right),
        "AP50": _average_precision(found),
        "presence_MCC": matthews(true > 0, said > 0),
        "empty_where_absent": _mean((said[true == 0] == 0).tolist()),
        "counting_error": _mean(np.abs(true - said).tolist()),
    }


def _iou(found: Found) -> float:
    return float(box_iou_xyxy(found.boxes_xyxy[:1], found.asked.boxes_xyxy)[0, 0])


def _average_precision(found: Sequence[Found]) -> float | None:
    """Return the AP at an IoU of 0.5 over all phrases, each as an image of its own with a single class."""
    from pix2seq.metrics.coco_ap import average_precision  # here, because asking needs neither pandas nor pycocotools

    if not found:
        return None
    corners = np.concatenate([boxes for each in found for boxes in (each.boxes_xyxy, each.asked.boxes_xyxy)])
    side = 1 + int(corners.max(initial=0))
    targets, predictions = [], {}
    for number, each in enumerate(found, start=1):
        boxes = each.asked.boxes_xyxy.astype(np.float32)
        count = len(boxes)
        targets.append(
            Target(
                image=ImageRecord(number, Path(f"{number}"), side, side),
                boxes_xyxy=boxes,
                labels=np.full(count, NAMED.label),
                areas=box_area(boxes).astype(np.float32),
                iscrowd=np.zeros(count, np.bool_),
                annotation_ids=np.arange(1, count + 1),
                segmentations=(None,) * count,
                keypoints=np.zeros((count, 0, 3), np.float32),
            )
        )
        predictions[number] = [
            Instance((b[0], b[1], b[2], b[3]), NAMED, score)
            for b, score in zip(each.boxes_xyxy.tolist(), each.scores.tolist(), strict=True)
        ]
    return average_precision(targets, [NAMED], predictions).metrics["AP50"]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
