"""Detection as tokens: y0, x0, y1, x1, class for each object.

Converts labels to ids and back, without model or I/O. Boxes are `yxyx` in [0, 1] of the model's
input; labels start at 1; shapes use N objects and L = 5 N tokens.

Reference: arXiv 2109.10852, section 3, and google-research/pix2seq,
`tasks/object_detection.py` (sequences, weights) and `data/data_utils.py` (noise objects).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import CLASS_BASE, EOS, NOISE, Vocab

TOKENS_PER_OBJECT = 5
NOISE_LABEL = 0  # the label of a noise object

ClassCorruption = Literal["none", "rand_cls", "real_n_fake_cls", "rand_n_fake_cls", "real_n_rand_n_fake_cls"]


@dataclass(frozen=True)
class DetectionResponse:
    """What the decoder reads and what it should predict; each array is (L,) or, with an end token, (L + 1,)."""

    inputs: NDArray[np.int64]  # with corrupted classes, for teacher forcing
    targets: NDArray[np.int64]  # with true classes; NOISE for noise objects
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class DecodedObjects:
    """Objects read from a sequence, one row per five tokens."""

    boxes_yxyx: NDArray[np.float32]  # (N, 4) in [0, 1]
    labels: NDArray[np.int64]  # (N,) best real class, from 1
    scores: NDArray[np.float32]  # (N,) its probability
    readable: NDArray[np.bool_]  # (N,) four coordinates that enclose an area, and a class


def encode_objects(
    boxes_yxyx: NDArray[np.floating],
    labels: NDArray[np.integer],
    vocab: Vocab,
    rng: np.random.Generator,
    *,
    num_labels: int | None = None,
    class_corruption: ClassCorruption = "rand_n_fake_cls",
    noise_weight: float = 1.0,
    eos_weight: float | None = None,
) -> DetectionResponse:
    """Serialise boxes (N, 4) and labels (N,), in the given order; label 0 marks a noise object.

    All five tokens of a real object have loss weight 1. Of a noise object only the class has a weight,
    `noise_weight`: the model must not learn positions of random boxes. `class_corruption` replaces the
    classes that the decoder reads, as published: `rand_n_fake_cls` by a random class or the noise class
    with equal odds, so that no class can be guessed from earlier ones. Random classes are drawn from
    `num_labels` classes, by default as many as the vocabulary holds. With `eos_weight`, an end token of
    that weight follows.
    """
    is_noise = labels == NOISE_LABEL
    coords = vocab.coord_ids(boxes_yxyx)  # (N, 4)
    classes = np.where(is_noise, NOISE, labels + CLASS_BASE).astype(np.int64)
    if (~is_noise).any():
        vocab.class_ids(labels[~is_noise])  # range check
    read_classes = corrupt_classes(classes, class_corruption, num_labels or vocab.max_label, rng)

    inputs = np.concatenate([coords, read_classes[:, None]], axis=1).ravel()
    targets = np.concatenate([coords, classes[:, None]], axis=1).ravel()
    by_object = np.ones((len(labels), TOKENS_PER_OBJECT), np.float32)
    by_object[is_noise, :4] = 0.0
    by_object[is_noise, 4] = noise_weight
    weights: NDArray[np.float32] = by_object.ravel()
    if eos_weight is not None:
        inputs = np.append(inputs, EOS)
        targets = np.append(targets, EOS)
        weights = np.append(weights, np.float32(eos_weight))
    return DetectionResponse(inputs, targets, weights)


def corrupt_classes(
    classes: NDArray[np.int64], how: ClassCorruption, num_labels: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the class ids (N,) that the decoder reads; see `encode_objects`."""
    if how == "none":
        return classes
    # The official draw includes CLASS_BASE itself, which is not the id of a class.
    random = CLASS_BASE + rng.integers(0, num_labels + 1, classes.shape)
    noise = np.full_like(classes, NOISE)
    coin = rng.random((2, len(classes))) > 0.5
    random_or_noise = np.where(coin[0], random, noise)
    choices = {
        "rand_cls": random,
        "real_n_fake_cls": np.where(coin[1], classes, noise),
        "rand_n_fake_cls": random_or_noise,
        "real_n_rand_n_fake_cls": np.where(coin[1], classes, random_or_noise),
    }
    if how not in choices:
        raise ValueError(f"unknown class corruption {how!r}; known: none, {', '.join(choices)}")
    return choices[how].astype(np.int64)


def decode_objects(
    ids: NDArray[np.integer],
    best_classes: NDArray[np.integer],
    class_logprobs: NDArray[np.floating],
    vocab: Vocab,
) -> DecodedObjects:
    """Read objects from generated ids (L,). Never raises, for any ids.

    `best_classes` and `class_logprobs` (L,) hold the most likely class id and its log-probability at
    every position; only every fifth is used. The sampled class, often NOISE, only feeds the decoder:
    the result is the best real class, with its probability as the score, which keeps the recall of the
    detector. An end token ends the list, and an incomplete object at the end is dropped. Rows that are
    not objects stay, as in the official code, and are marked unreadable.
    """
    end = np.flatnonzero(ids == EOS)
    length = int(end[0]) if len(end) else len(ids)
    num_objects = length // TOKENS_PER_OBJECT
    groups = ids[: num_objects * TOKENS_PER_OBJECT].reshape(num_objects, TOKENS_PER_OBJECT)
    coord_ids = groups[:, :4]
    boxes = vocab.coords(coord_ids)
    at_class = np.arange(num_objects) * TOKENS_PER_OBJECT + 4
    labels = best_classes[at_class].astype(np.int64) - CLASS_BASE
    scores = np.exp(class_logprobs[at_class]).astype(np.float32)

    is_coord = ((coord_ids >= vocab.coord_base) & (coord_ids < vocab.coord_end)).all(axis=1)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return DecodedObjects(boxes, labels, scores, is_coord & has_area & (labels >= 1))


def add_noise_objects(
    boxes_yxyx: NDArray[np.floating],
    labels: NDArray[np.integer],
    num_noise: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Append `num_noise` noise objects (label 0) to N real ones, which keep their order.

    Between 0 and `num_noise` of them (uniform; 0 without real objects) are jittered duplicates of real
    boxes; the rest are real boxes moved elsewhere and random boxes. All noise objects are shuffled.
    Returns boxes (N + num_noise, 4) and labels (N + num_noise,).
    """
    boxes = np.asarray(boxes_yxyx, np.float32).reshape(-1, 4)
    num_real = len(boxes)
    num_duplicates = int(rng.integers(0, num_noise + 1)) if num_real else 0
    num_bad = num_noise - num_duplicates

    # Every real box appears equally often, as far as possible.
    pool = np.tile(np.arange(num_real), num_noise // num_real + 1) if num_real else np.arange(0)
    shifted = shift_boxes(boxes[rng.permutation(pool)[:num_bad]], rng)
    bad = np.concatenate([shifted, random_boxes(num_bad, rng)])
    bad = bad[rng.permutation(len(bad))[:num_bad]]
    duplicates = jitter_boxes(boxes[rng.permutation(pool)[:num_duplicates]], rng, max_range=0.1)
    noise = np.concatenate([bad, duplicates])[rng.permutation(num_noise)]

    noise_labels = np.full(num_noise, NOISE_LABEL, np.int64)
    return (
        np.concatenate([boxes, noise]).astype(np.float32),
        np.concatenate([np.asarray(labels, np.int64), noise_labels]),
    )


def jitter_boxes(boxes: NDArray[np.floating], rng: np.random.Generator, *, max_range: float) -> NDArray[np.floating]:
    """Move each side of `yxyx` boxes by up to `max_range` of the box's size (normal, truncated at two sigma)."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return np.clip(boxes + size * _truncated_normal(boxes.shape, max_range / 2, rng), 0, 1)


def shift_boxes(boxes: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    """Move boxes to uniformly random centres, clipped to [0, 1]."""
    return _boxes_around(rng.random((len(boxes), 2)), boxes[:, 2:] - boxes[:, :2])


def random_boxes(num: int, rng: np.random.Generator) -> NDArray[np.floating]:
    """Draw boxes (num, 4) of random centre and size, clipped to [0, 1]."""
    return _boxes_around(rng.random((num, 2)), np.abs(_truncated_normal((num, 2), 0.5, rng)))


def _boxes_around(centres: NDArray[np.floating], sizes: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.clip(np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1), 0, 1)


def _truncated_normal(shape: tuple[int, ...], std: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """Draw normal values, redrawn beyond two standard deviations, as TensorFlow's `truncated_normal`."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values * std
