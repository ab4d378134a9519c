"""How far a score is a probability: expected calibration error, Brier score, reliability; and maps that make it one.

Shapes: N answers, each with a score from 0 to 1 that claims the probability of being right. References:
arXiv 1706.04599 (expected calibration error with 15 bins, temperature), Brier 1950, Zadrozny and Elkan 2002 (isotonic).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.types import category_key

NUM_BINS = 15
MIN_SCORE = 0.05  # answers below are left out of the errors: the many near zero would flatter them
NUM_FOLDS = 5
MIN_ANSWERS = 200  # of a class in order to get a map of its own
MIN_BLOCK = 20  # answers that share a level of an isotonic map
SLOPE = 1e-3  # share of the score itself in a map, which keeps different scores different
LOGIT_LIMIT = 9.0  # of scores near 0 and 1, in fitting a temperature
NO_CLASS = ""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Graded:
    """Answers with their scores, and whether each is right."""

    scores: Floats  # (N,) 0 to 1
    is_right: NDArray[np.bool_]  # (N,)
    image_ids: NDArray[np.int64]  # (N,)
    classes: NDArray[np.str_]  # (N,) names; `NO_CLASS` for answers without one
    sizes: NDArray[np.str_]  # (N,) small, medium or large as COCO has them; "" for answers without a size
    num_truths: int  # what there was to be found: recall counts right answers against it

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Graded:
        """Return some of the answers."""
        return Graded(
            self.scores[chosen],
            self.is_right[chosen],
            self.image_ids[chosen],
            self.classes[chosen],
            self.sizes[chosen],
            self.num_truths,
        )

    def with_scores(self, scores: Floats) -> Graded:
        """Return the same answers with other scores (N,)."""
        return replace(self, scores=scores)


@dataclass(frozen=True)
class Bin:
    """The answers with scores from `low` to `high`."""

    low: float
    high: float
    count: int
    mean_score: float | None  # None without an answer
    share_right: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Reliability:
    """How far the scores of some answers are probabilities."""

    count: int
    error: float | None  # expected calibration error, 0 to 1; None without an answer
    brier: float | None  # mean squared difference of score and truth; None without an answer
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the bins."""
        return {"count": self.count, "ECE": self.error, "Brier": self.brier}


def reliability(scores: Floats, is_right: NDArray[np.bool_], num_bins: int = NUM_BINS) -> Reliability:
    """Compare scores (N,) with the share of right answers, in bins of equal width; 1 falls into the last."""
    number = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    bins, error = [], 0.0
    for k in range(num_bins):
        inside = number == k
        count = int(inside.sum())
        mean = float(scores[inside].mean()) if count else None
        share = float(is_right[inside].mean()) if count else None
        bins.append(Bin(k / num_bins, (k + 1) / num_bins, count, mean, share))
        if mean is not None and share is not None:
            error += count / len(scores) * abs(share - mean)
    if not len(scores):
        return Reliability(0, None, None, tuple(bins))
    return Reliability(len(scores), error, float(((scores - is_right) ** 2).mean()), tuple(bins))


@dataclass(frozen=True)
class CalibrationReport:
    """How far the scores of a task are probabilities, over answers of a score of at least `MIN_SCORE`."""

    overall: Reliability
    by_class: dict[str, Reliability]
    by_size: dict[str, Reliability]

    @classmethod
    def of(cls, graded: Graded) -> CalibrationReport:
        """Measure the answers together, by class and by size."""
        likely = graded[graded.scores >= MIN_SCORE]

        def split(labels: NDArray[np.str_]) -> dict[str, Reliability]:
            names = [name for name in dict.fromkeys(labels.tolist()) if name]
            return {name: reliability(likely.scores[labels == name], likely.is_right[labels == name]) for name in names}

        return cls(reliability(likely.scores, likely.is_right), split(likely.classes), split(likely.sizes))

    @property
    def metrics(self) -> dict[str, float | None]:
        """The main numbers by name."""
        return {"ECE": self.overall.error, "Brier": self.overall.brier}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.overall.to_json(),
            "min_score": MIN_SCORE,
            "by_class": {name: part.to_json() for name, part in self.by_class.items()},
            "by_size": {name: part.to_json() for name, part in self.by_size.items()},
            "bins": [each.to_json() for each in self.overall.bins],
        }


@dataclass(frozen=True)
class ScoreMap:
    """A rising map from a score to the probability of being right: linear between points."""

    kind: str  # how it was fitted: identity, temperature or isotonic
    scores: tuple[float, ...]  # rising, from 0 to 1
    probabilities: tuple[float, ...]  # rising, of each of `scores`

    def __post_init__(self) -> None:
        for name in ("scores", "probabilities"):
            values = getattr(self, name)
            if not all(map(_is_share, values)):
                raise ValueError(f"{name} of a calibration map must be numbers from 0 to 1")
            if not all(a < b for a, b in pairwise(values)):
                raise ValueError(f"{name} of a calibration map must rise")
        if len(self.scores) != len(self.probabilities) or self.scores[:1] != (0,) or self.scores[-1:] != (1,):
            raise ValueError("a calibration map needs as many probabilities as scores, which go from 0 to 1")

    def __call__(self, scores: Floats) -> Floats:
        """Return the probability of each score (N,)."""
        return np.interp(scores, self.scores, self.probabilities)


@dataclass(frozen=True)
class TaskCalibration:
    """What a checkpoint knows of the scores of a task."""

    threshold: float  # least score that is worth showing
    precision: float | None  # of answers of at least `threshold` on the data that it was chosen on
    recall: float | None
    maps: tuple[tuple[tuple[str, ...], ScoreMap], ...]  # by names of classes; no names: all others

    def map_of(self, name: str) -> ScoreMap:
        """Return the map of a class, `NO_CLASS` for answers without one."""
        key = category_key(name)
        own = (each for names, each in self.maps if key in map(category_key, names))
        rest = (each for names, each in self.maps if not names)
        return next(own, next(rest, IDENTITY))

    def probability(self, score: float, name: str = NO_CLASS) -> float:
        """Return the probability that an answer of this score and class is right."""
        return float(self.map_of(name)(np.array(score, np.float64)))

    def apply(self, graded: Graded) -> Graded:
        """Return answers with probabilities for scores."""
        scores = graded.scores.copy()
        for name in dict.fromkeys(graded.classes.tolist()):
            own = graded.classes == name
            scores[own] = self.map_of(name)(scores[own])
        return graded.with_scores(scores)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for config.json, the inverse of `from_json`."""
        return {
            "threshold": self.threshold,
            "precision": self.precision,
            "recall": self.recall,
            "maps": [
                {
                    "classes": list(names),
                    "kind": each.kind,
                    "scores": list(each.scores),
                    "probabilities": list(each.probabilities),
                }
                for names, each in self.maps
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskCalibration:
        """Read what `to_json` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        maps = []
        for entry in value["maps"]:
            names = tuple(entry["classes"])
            if not all(isinstance(name, str) for name in (*names, entry["kind"])):
                raise ValueError("classes and kinds of calibration maps must be texts")
            maps.append((names, ScoreMap(entry["kind"], tuple(entry["scores"]), tuple(entry["probabilities"]))))
        threshold, precision, recall = (value[name] for name in ("threshold", "precision", "recall"))
        if threshold is None or not all(each is None or _is_share(each) for each in (threshold, precision, recall)):
            raise ValueError("threshold, precision and recall of a calibration must be numbers from 0 to 1")
        return cls(threshold, precision, recall, tuple(maps))


def fit_temperature(scores: Floats, is_right: NDArray[np.bool_]) -> ScoreMap:
    """Fit `sigmoid(slope * logit(score) + offset)`, slope positive, by likelihood with Platt's smoothed targets."""
    from scipy.optimize import minimize

    logits = _logit(scores)
    num_right = int(is_right.sum())
    num_wrong = len(is_right) - num_right
    targets = np.where(is_right, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))

    def loss(parameters: Floats) -> tuple[float, Floats]:
        slope = np.exp(parameters[0])
        z = slope * logits + parameters[1]
        error = _sigmoid(z) - targets
        value = float((np.logaddexp(0, z) - targets * z).mean())
        return value, np.array([(error * logits).mean() * slope, error.mean()])

    log_slope, offset = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-5, 5), (-20, 20)]).x
    knots = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, 37)
    inner, values = _sigmoid(knots), _sigmoid(np.exp(log_slope) * knots + offset)
    return _rising("temperature", np.concatenate([[0], inner, [1]]), np.concatenate([values[:1], values, values[-1:]]))


def fit_isotonic(scores: Floats, is_right: NDArray[np.bool_]) -> ScoreMap:
    """Fit the best rising steps, of at least `MIN_BLOCK` answers each, and join the middles of the steps by lines."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, max(len(order) // MIN_BLOCK, 1))
    sizes = np.array([len(part) for part in parts], np.float64)
    shares = np.array([is_right[part].mean() for part in parts])
    fitted = isotonic_regression(shares, weights=sizes)
    middles, levels = [], []
    for first, end in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True):
        middles.append(scores[np.concatenate(parts[first:end])].mean())
        levels.append(fitted.x[first])
    x = np.concatenate([[0], middles, [1]])
    y = np.concatenate([levels[:1], levels, levels[-1:]])
    return _rising("isotonic", x, y)


def _is_share(value: Any) -> bool:
    """Whether a value from a file is a number from 0 to 1; NaN is none."""
    return isinstance(value, int | float) and 0 <= value <= 1


def _rising(kind: str, scores: Floats, probabilities: Floats) -> ScoreMap:
    """Return a map through points that rise or stay, with a slope of at least `SLOPE`."""
    x, first = np.unique(np.clip(scores, 0, 1), return_index=True)
    y = (1 - SLOPE) * np.clip(probabilities[first], 0, 1) + SLOPE * x
    x, y = x.round(9), y.round(9)
    keep = np.append(True, (np.diff(x) > 0) & (np.diff(y) > 0))
    keep[-1] = True
    keep[-2] &= x[-2] < x[-1] and y[-2] < y[-1]
    return ScoreMap(kind, tuple(x[keep].tolist()), tuple(y[keep].tolist()))


def _logit(scores: Floats) -> Floats:
    tiny = float(_sigmoid(np.array(-LOGIT_LIMIT)))
    clipped = np.clip(scores, tiny, 1 - tiny)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))


IDENTITY = ScoreMap("identity", (0.0, 1.0), (0.0, 1.0))
Fit = Callable[[Floats, NDArray[np.bool_]], ScoreMap]
FITS: dict[str, Fit] = {
    "identity": lambda scores, is_right: IDENTITY,
    "temperature": fit_temperature,
    "isotonic": fit_isotonic,
}
Maps = tuple[tuple[tuple[str, ...], ScoreMap], ...]


def fit_maps(graded: Graded, fit: Fit, *, by_class: bool) -> Maps:
    """Fit a map for each class of at least `MIN_ANSWERS` answers, if `by_class`, and one for all other answers."""
    names = [name for name in dict.fromkeys(graded.classes.tolist()) if name] if by_class else []
    counts = {name: int((graded.classes == name).sum()) for name in names}
    own = [name for name in names if counts[name] >= MIN_ANSWERS]
    maps: list[tuple[tuple[str, ...], ScoreMap]] = []
    for name in own:
        chosen = graded.classes == name
        maps.append(((name,), fit(graded.scores[chosen], graded.is_right[chosen])))
    rest = ~np.isin(graded.classes, own)
    chosen = rest if rest.any() else np.ones(len(rest), np.bool_)  # classes that are new get what fits all
    maps.append(((), fit(graded.scores[chosen], graded.is_right[chosen])))
    return tuple(maps)
