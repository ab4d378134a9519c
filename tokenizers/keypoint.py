"""Keypoints as a language: y and x of every point of a skeleton, in its order.

Labels to ids and ids to labels, no model and no I/O. Points are `yx` in [0, 1] of the model's input;
shapes use K points and L = 2 K tokens. Any skeleton will do; its length is known from the class that
is asked for, so a sequence needs no end.

Reference: arXiv 2206.07669, section 3, and google-research/pix2seq, `tasks/keypoint_detection.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import INVISIBLE, Vocab


@dataclass(frozen=True)
class KeypointResponse:
    """What the decoder reads and what it should say; each array is (2 K,)."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


def encode_keypoints(
    points_yx: NDArray[np.floating],
    visible: NDArray[np.bool_],
    vocab: Vocab,
    rng: np.random.Generator | None = None,
    *,
    invisible_weight: float = 0.1,
) -> KeypointResponse:
    """Serialise points (K, 2); one that is not `visible` (K,) becomes the invisible token twice.

    Invisible tokens are scored with `invisible_weight`: that nothing was annotated is not worth as
    much as a place. With `rng`, a share of what the decoder reads, itself uniform in [0, 1), is
    replaced by the invisible token, so that no point can be guessed from its neighbours alone.
    """
    ids = np.where(visible[:, None], vocab.coord_ids(np.nan_to_num(points_yx)), INVISIBLE)
    targets = ids.astype(np.int64).ravel()
    weights = np.where(targets == INVISIBLE, np.float32(invisible_weight), np.float32(1.0))
    inputs = targets
    if rng is not None:
        masked = rng.random(len(targets)) < rng.random()
        inputs = np.where(masked, INVISIBLE, targets)
    return KeypointResponse(inputs, targets, weights)


def decode_keypoints(
    ids: NDArray[np.integer], num_points: int, vocab: Vocab
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Points (K, 2) `yx` in [0, 1] and whether each was given, (K,). Never raises, whatever the ids (L,).

    A point is given by two coordinates; anything else, or nothing, leaves it out, at (0, 0).
    """
    pairs = np.zeros((num_points, 2), np.int64)
    read = ids[: 2 * num_points]
    pairs.ravel()[: len(read)] = read
    given: NDArray[np.bool_] = np.all((pairs >= vocab.coord_base) & (pairs < vocab.coord_end), axis=1)
    points = vocab.coords(pairs)
    points[~given] = 0
    return points, given
