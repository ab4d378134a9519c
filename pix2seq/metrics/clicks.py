"""How well clicks are answered: IoU after so many clicks, clicks to a good answer, and what is found without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.clicks import Click
from pix2seq.metrics.coco_ap import ApMetric
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.types import Category, Instance, ObjectMask, Target

AFTER = (1, 3, 5, 8)
GOOD = (0.85, 0.9)
OBJECT = Category(1, 1, "object")


@dataclass(frozen=True)
class Trial:
    """An object that a simulated user clicks on until it is found."""

    annotation_id: int
    truth: NDArray[np.bool_]  # (H, W) mask in pixels of the image
    clicks: tuple[Click, ...] = ()
    ious: tuple[float, ...] = ()  # of the best answer after each click
    scores: tuple[float, ...] = ()  # what the model said these would be
    best_ious: tuple[float, ...] = ()  # of the best of all candidates
    outlines: tuple[tuple[NDArray[np.float32], ...], ...] = ()  # rings of the answer after each click

    def with_answer(self, ious: Sequence[float], score: float, outline: tuple[NDArray[np.float32], ...]) -> Trial:
        """Add the IoUs of the candidates after another click, and score and rings of the first of them."""
        return replace(
            self,
            outlines=(*self.outlines, outline),
            ious=(*self.ious, ious[0]),
            scores=(*self.scores, score),
            best_ious=(*self.best_ious, max(ious)),
        )


@dataclass(frozen=True)
class Checked:
    """What evaluation gets: trials of some objects, and all that was found without a click."""

    trials: tuple[Trial, ...]
    found: tuple[ObjectMask, ...]


class ClickMetric(Metric):
    """Scores trials, and objects that were found without a click, whatever their classes."""

    def __init__(self, max_clicks: int) -> None:
        """A trial counts as `max_clicks` where no click reached an IoU."""
        self.max_clicks = max_clicks
        self.ious: list[tuple[float, ...]] = []
        self.best: list[float] = []  # IoU of the best candidate after the first click
        self.said: list[tuple[float, float]] = []  # score and IoU of each answer
        self.everything = ApMetric([OBJECT], "mask")
        self.has_masks = False

    def add(self, target: Target, answers: Sequence[Checked]) -> None:
        """See `Metric`."""
        for checked in answers:
            for trial in checked.trials:
                self.ious.append(trial.ious)
                self.best += trial.best_ious[:1]
                self.said += zip(trial.scores, trial.ious, strict=True)
            found = [Instance(each.box_xyxy, OBJECT, each.score, each.polygons) for each in checked.found]
            self.has_masks |= any(target.segmentations)
            self.everything.add(replace(target, labels=np.ones_like(target.labels)), found)

    def merge(self, other: ClickMetric) -> None:
        """See `Metric`."""
        self.ious += other.ious
        self.best += other.best
        self.said += other.said
        self.has_masks |= other.has_masks
        self.everything.merge(other.everything)

    def result(self) -> Scores:
        """See `Metric`."""
        scores: dict[str, float | None] = {
            f"mIoU@{number}": _mean([ious[min(number, len(ious)) - 1] for ious in self.ious]) for number in AFTER
        }
        scores["best_mIoU@1"] = _mean(self.best)
        for good in GOOD:
            needed = [next((n for n, iou in enumerate(ious, 1) if iou >= good), 0) for ious in self.ious]
            scores[f"NoC{good * 100:.0f}"] = _mean([n or self.max_clicks for n in needed])
            scores[f"never{good * 100:.0f}"] = _mean([n == 0 for n in needed])
        scores["score_correlation"] = _correlation(self.said)
        if self.has_masks:
            found = self.everything.result().metrics
            scores |= {name: found[name] for name in ("AR10", "AR100")}
            scores = {name.replace("AR1", "AR@1"): value for name, value in scores.items()}
        return Scores(scores)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Pearson's correlation, None where one side does not vary."""
    columns = np.array(pairs, np.float64).reshape(-1, 2)
    if len(columns) < 2 or not columns.std(axis=0).all():
        return None
    centred = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    return float(centred.prod(axis=1).mean())
