"""Keypoints as tokens: y and x of every point of a skeleton, in its order.

Converts labels to ids and back, without model or I/O. Points are `yx` in [0, 1] of the model's input;
shapes use K points and L = 2 K tokens. Any skeleton works; the class in the prompt gives its length, so
a sequence needs no end token.

Reference: arXiv 2206.07669, section 3, and google-research/pix2seq, `tasks/keypoint_detection.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import INVISIBLE, Vocab


@dataclass(frozen=True)
class KeypointResponse:
    """What the decoder reads and what it should predict; each array is (2 K,)."""

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
    """Serialise points (K, 2); a point that is not `visible` (K,) becomes the invisible token twice.

    Invisible tokens have the loss weight `invisible_weight`: a missing annotation says less than a
    position. With `rng`, a random share (uniform in [0, 1)) of the tokens that the decoder reads is
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
    """Read points (K, 2), `yx` in [0, 1], and whether each was given, (K,). Never raises, for any ids (L,).

    A point is given by two coordinates; anything else, or nothing, leaves it at (0, 0), not given.
    """
    pairs = np.zeros((num_points, 2), np.int64)
    read = ids[: 2 * num_points]
    pairs.ravel()[: len(read)] = read
    given: NDArray[np.bool_] = np.all((pairs >= vocab.coord_base) & (pairs < vocab.coord_end), axis=1)
    points = vocab.coords(pairs)
    points[~given] = 0
    return points, given
