"""Objects by words as tokens: a phrase and a slot, answered by boxes of the slot's class.

    prompt     task  slot  word ...  SEPARATOR
    response   y0 x0 y1 x1 class ...            class: the slot for objects that the phrase names, else NOISE

Converts to ids and back, without model or I/O. Boxes are `yxyx` in [0, 1] of the model's input; N objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT, DetectionResponse
from pix2seq.vocab import NOISE, SEPARATOR, Vocab

EXTRA_TOKENS = 3  # of a prompt, beside the words


def phrase_prompt(task_id: int, slot: int, text_ids: Sequence[int], vocab: Vocab) -> NDArray[np.int64]:
    """Return a prompt (3 + W,) of a slot's id and the W ids of a phrase, from 0 as a text tokenizer gives them."""
    return np.array([task_id, slot, *(vocab.text_base + each for each in text_ids), SEPARATOR], np.int64)


def encode_named(
    boxes_yxyx: NDArray[np.floating],
    is_named: NDArray[np.bool_],
    slot: int,
    vocab: Vocab,
    rng: np.random.Generator,
    *,
    noise_weight: float = 1.0,
) -> DetectionResponse:
    """Serialise boxes (N, 4), in the given order: those that a phrase names, and noise, which it does not.

    Of noise only the class has a weight, `noise_weight`. The decoder reads slot or noise with equal odds in place of
    the true class, so that no class can be guessed from earlier ones.
    """
    classes = np.where(is_named, slot, NOISE)
    read = np.where(rng.random(len(classes)) < 0.5, slot, NOISE)
    coords = vocab.coord_ids(boxes_yxyx)
    weights = np.where(is_named, 1.0, 0.0)[:, None] * np.ones(TOKENS_PER_OBJECT)
    weights[:, -1] = np.where(is_named, 1.0, noise_weight)
    return DetectionResponse(
        np.concatenate([coords, read[:, None]], axis=1).ravel(),
        np.concatenate([coords, classes[:, None]], axis=1).ravel(),
        weights.ravel().astype(np.float32),
    )


def decode_named(
    ids: NDArray[np.integer], slot_logprobs: NDArray[np.floating], vocab: Vocab
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read boxes (N, 4) and the probability (N,) of each that the phrase names it. Never raises, for any ids (L,).

    `slot_logprobs` (L,) are of the slot at every position; only every fifth is used. Boxes without an area, and what
    is no box, are left out.
    """
    groups = ids[: len(ids) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)
    scores = np.exp(slot_logprobs[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT][: len(groups)]).astype(np.float32)
    coords = groups[:, :4]
    boxes = vocab.coords(coords)
    usable = ((coords >= vocab.coord_base) & (coords < vocab.coord_end)).all(axis=1)
    usable &= (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[usable], scores[usable]
