"""How well sentences and images are matched, and found by each other.

An image is found by a sentence, and a sentence by an image, if the sentence is one of the image's captions, or if the
image's facts say that it is true.

Shapes: I images, T different sentences, E width of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pix2seq.metrics.metric import Metric, Scores
from pix2seq.types import Target

RANKS = (1, 5, 10)
ROWS_AT_ONCE = 1024  # of similarities


class Truth(Protocol):
    """What is true of an image."""

    def say(self, text: str) -> bool:
        """Return whether a sentence is true."""
        ...


@dataclass(frozen=True)
class Statement:
    """A sentence that an image is asked about."""

    text: str
    false_by: str | None = None  # `other`: it is of another image; else the kind of its changed word; None: it is true
    changed_from: int | None = None  # number of the statement of which a word was changed

    @property
    def is_true(self) -> bool:
        """Whether it is true of the image."""
        return self.false_by is None


@dataclass(frozen=True)
class Examined:
    """What a model says of the statements about one image."""

    statements: tuple[Statement, ...]
    scores: NDArray[np.float64]  # (statements,) probability of being true
    image: NDArray[np.float32] | None  # (E,) its embedding; None: the model makes none
    sentences: NDArray[np.float32]  # (true statements, E) their embeddings


class SentenceScores(Scores):
    """Shares from 0 to 1: accuracy, AUROC, accuracy by kind of false sentence, and recall of both searches."""

    headline: ClassVar[tuple[str, ...]] = ("accuracy", "AUROC")


class SentenceMetric(Metric):
    """Accuracy of matching, and recall among all images and sentences by their embeddings."""

    def __init__(self, truth_of: Callable[[Target], Truth | None]) -> None:
        """`truth_of` gives what is true of an annotated image, or None if only its captions are known."""
        self.truth_of = truth_of
        self.examined: dict[int, Examined] = {}
        self.truths: dict[int, Truth | None] = {}

    def add(self, target: Target, answers: Sequence[Examined]) -> None:
        """See `Metric`."""
        self.examined[target.image.id] = answers[0]
        self.truths[target.image.id] = self.truth_of(target)

    def merge(self, other: SentenceMetric) -> None:
        """See `Metric`."""
        self.examined |= other.examined
        self.truths |= other.truths

    def result(self) -> SentenceScores:
        """See `Metric`."""
        ids = sorted(self.examined)  # so that equal similarities rank alike however images were shared
        examined = [self.examined[image_id] for image_id in ids]
        metrics = _accuracies(examined)
        if any(each.image is not None for each in examined):
            metrics |= _recalls(examined, [self.truths[image_id] for image_id in ids])
        return SentenceScores(metrics)


def _accuracies(examined: Sequence[Examined]) -> dict[str, float | None]:
    """Return accuracies, in which true and false sentences count alike, so that a constant answer has 0.5.

    That of a kind of changed word is over the changed sentences and those that they were made from.
    """
    right: dict[bool, list[bool]] = {True: [], False: []}
    scores: dict[bool, list[float]] = {True: [], False: []}
    by_kind: dict[str, list[tuple[bool, bool]]] = {}
    for each in examined:
        is_right = [
            (score >= 0.5) == statement.is_true
            for statement, score in zip(each.statements, each.scores.tolist(), strict=True)
        ]
        for statement, score, good in zip(each.statements, each.scores.tolist(), is_right, strict=True):
            right[statement.is_true].append(good)
            scores[statement.is_true].append(score)
            if statement.false_by is not None and statement.changed_from is not None:
                by_kind.setdefault(statement.false_by, []).append((good, is_right[statement.changed_from]))
    metrics: dict[str, float | None] = {"accuracy": None, "AUROC": auroc(scores[True], scores[False])}
    if right[True] and right[False]:
        metrics["accuracy"] = (_mean(right[True]) + _mean(right[False])) / 2
    metrics |= {f"{kind}/accuracy": float(np.mean(pairs)) for kind, pairs in sorted(by_kind.items())}
    return metrics


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return the probability that a positive's score is above a negative's; equal scores count half."""
    if not positive or not negative:
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def _recalls(examined: Sequence[Examined], truths: Sequence[Truth | None]) -> dict[str, float | None]:
    """Return the recall of images by sentences, and of sentences by images, each sentence counted once."""
    owners: dict[str, set[int]] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for number, each in enumerate(examined):
        true = [statement.text for statement in each.statements if statement.is_true]
        for text, vector in zip(true, each.sentences, strict=True):
            owners.setdefault(text, set()).add(number)
            vectors.setdefault(text, vector)
    texts = list(owners)
    images = np.array([each.image for each in examined], np.float32)
    sentences = np.array([vectors[text] for text in texts], np.float32)

    def is_true(image: int, text: int) -> bool:
        truth = truths[image]
        return image in owners[texts[text]] or (truth is not None and truth.say(texts[text]))

    to_images = [[is_true(image, text) for image in top] for text, top in enumerate(best(sentences, images))]
    to_sentences = [[is_true(image, text) for text in top] for image, top in enumerate(best(images, sentences))]
    return recalls("text_to_image", to_images) | recalls("image_to_text", to_sentences)


def best(queries: NDArray[np.float32], found: NDArray[np.float32], most: int = RANKS[-1]) -> list[list[int]]:
    """Return the rows of `found` (F, E) that are most similar to each of `queries` (Q, E), best first."""
    tops: list[list[int]] = []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        similarities = queries[start : start + ROWS_AT_ONCE] @ found.T
        tops += np.argsort(-similarities, axis=1, kind="stable")[:, :most].tolist()
    return tops


def recalls(name: str, right: Sequence[Sequence[bool]]) -> dict[str, float | None]:
    """Return the share of queries with a right one among their first 1, 5 and 10, given whether each is right."""
    return {f"{name}/R@{k}": float(np.mean([any(each[:k]) for each in right])) for k in RANKS}


def _mean(values: Collection[bool]) -> float:
    return sum(values) / len(values)
