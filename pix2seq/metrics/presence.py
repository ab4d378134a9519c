"""How well objects are found whose kind the question says: AP, whether there is any, and how many.

Images are asked for kinds that they have and for kinds that they lack. P pairs of an image and a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pix2seq.metrics.coco_ap import ApMetric
from pix2seq.metrics.correlation import matthews
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.types import Category, Instance, Target


@dataclass(frozen=True)
class Found:
    """What was found of one kind of object in an image."""

    label: int  # of the class that the question meant, which the model was not told
    instances: tuple[Instance, ...]
    is_unseen: bool = False  # training left the class out


class PresenceMetric(Metric):
    """Scores what was found of the kinds that images were asked for, and of those that training left out apart."""

    def __init__(self, categories: Sequence[Category], min_score: float, *, with_masks: bool = False) -> None:
        """Objects of at least `min_score` count as found; AP takes all. `with_masks` adds AP of those that have one."""
        self.all, self.seen, self.unseen = (_Part(categories, min_score, with_masks=with_masks) for _ in range(3))

    def add(self, target: Target, answers: Sequence[Found]) -> None:
        """See `Metric`. A class of which the image has a crowd counts for AP alone."""
        self.all.add(target, answers)
        self.seen.add(target, [found for found in answers if not found.is_unseen])
        self.unseen.add(target, [found for found in answers if found.is_unseen])

    def merge(self, other: PresenceMetric) -> None:
        """See `Metric`."""
        self.all.merge(other.all)
        self.seen.merge(other.seen)
        self.unseen.merge(other.unseen)

    def result(self) -> Scores:
        """See `Metric`."""
        scores = self.all.scores()
        if self.unseen.ap.targets:
            scores |= {f"seen/{name}": value for name, value in self.seen.scores().items()}
            scores |= {f"unseen/{name}": value for name, value in self.unseen.scores().items()}
        return Scores(scores)


class _Part:
    """Scores of some of the kinds."""

    def __init__(self, categories: Sequence[Category], min_score: float, *, with_masks: bool) -> None:
        self.categories = {category.label: category for category in categories}
        self.min_score = min_score
        self.ap = ApMetric(categories, "box")
        self.mask_ap = ApMetric(categories, "mask") if with_masks else None
        self.counts: list[tuple[int, int]] = []  # true and found objects of each pair

    def add(self, target: Target, answers: Sequence[Found]) -> None:
        asked = np.isin(target.labels, [found.label for found in answers])
        if answers:
            named = [
                replace(each, category=self.categories[found.label]) for found in answers for each in found.instances
            ]
            shown = target.subset(np.flatnonzero(asked).tolist())
            self.ap.add(shown, named)
            if self.mask_ap is not None:
                self.mask_ap.add(shown, named)
        for found in answers:
            same = target.labels == found.label
            if not target.iscrowd[same].any():
                number = sum(each.score >= self.min_score for each in found.instances)
                self.counts.append((int(same.sum()), number))

    def merge(self, other: _Part) -> None:
        self.ap.merge(other.ap)
        if self.mask_ap is not None and other.mask_ap is not None:
            self.mask_ap.merge(other.mask_ap)
        self.counts += other.counts

    def scores(self) -> dict[str, float | None]:
        ap = self.ap.result().metrics if self.ap.targets else {}
        masks = self.mask_ap.result().metrics if self.mask_ap is not None and self.mask_ap.targets else {}
        true, found = np.array(self.counts, np.int64).reshape(-1, 2).T
        return {
            "AP": ap.get("AP"),
            "AP50": ap.get("AP50"),
            **({} if self.mask_ap is None else {f"mask_{name}": masks.get(name) for name in ("AP", "AP50")}),
            "presence_MCC": matthews(true > 0, found > 0),
            "empty_where_absent": float((found[true == 0] == 0).mean()) if (true == 0).any() else None,
            "counting_error": float(np.abs(true - found).mean()) if len(true) else None,
        }
