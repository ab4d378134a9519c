"""Objects of slots as tokens: the answer to prompts that say what a slot stands for.

    y0 x0 y1 x1 slot-or-NOISE  ...  end

All objects of the slots that a prompt asks for are answered, mixed with objects of no slot, which are noise, and then
boxes without an object, which are noise too. As in detection, the answer is the best slot of each box with its
probability, among the slots of the prompt and noise. These slots follow each other from a first one.

Converts to ids and back, without model or I/O. Boxes are `yxyx` in [0, 1] of what the model sees; shapes use N objects
and L tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.detection import (
    NOISE_LABEL,
    TOKENS_PER_OBJECT,
    DecodedObjects,
    DetectionResponse,
    decode_objects,
    encode_objects,
)
from pix2seq.vocab import CLASS_BASE, MAX_SIZE, NOISE, SLOTS, Vocab

NO_SLOT = -1  # of an object that the prompt does not ask for
NONE = -1  # in place of a choice


def encode_found(
    boxes_yxyx: NDArray[np.floating],
    slots: NDArray[np.integer],
    is_object: NDArray[np.bool_],
    asked: range,
    vocab: Vocab,
    rng: np.random.Generator,
    *,
    class_weight: float,
    eos_weight: float,
) -> DetectionResponse:
    """Serialise boxes (N, 4) of slots (N,), numbers from 0 or -1 for none, in the given order, and an end.

    `asked` are the slots of the prompt. The decoder reads one of them or the noise class in place of each true class,
    with equal odds. Boxes without an object (`is_object`) have no loss on coordinates.
    """
    labels = np.where(slots < 0, NOISE_LABEL, slots - asked.start + 1)
    plain = encode_objects(boxes_yxyx, labels, vocab, rng, num_labels=len(asked), eos_weight=eos_weight)
    inputs, targets = (_with_slots(ids, asked) for ids in (plain.inputs, plain.targets))
    weights = plain.weights.copy()
    objects = weights[:-1].reshape(-1, TOKENS_PER_OBJECT)
    objects[is_object, : TOKENS_PER_OBJECT - 1] = 1.0
    objects[:, -1] = class_weight
    return DetectionResponse(inputs, targets, weights)


def class_choices(length: int, asked: range) -> NDArray[np.int64]:
    """Return the `choices` (L, 4) of a response of `length` tokens: classes are slots of the prompt, or noise."""
    choices = np.tile(np.array([0, MAX_SIZE, NONE, NONE]), (length, 1))
    choices[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT] = (SLOTS[0] + asked.start, SLOTS[0] + asked.stop, NOISE, NONE)
    return choices


def decode_found(
    ids: NDArray[np.integer],
    best_slots: NDArray[np.integer],
    logprobs: NDArray[np.floating],
    vocab: Vocab,
) -> DecodedObjects:
    """Read objects from any ids (L,), see `decode_objects`; labels are numbers of slots from 1."""
    return decode_objects(ids, best_slots - SLOTS[0] + CLASS_BASE + 1, logprobs, vocab)


def _with_slots(ids: NDArray[np.int64], asked: range) -> NDArray[np.int64]:
    """Return a response of detection (L,) with slots in place of classes, which are numbered from 1."""
    found = ids.copy()
    classes = found[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT]
    classes[classes > CLASS_BASE] += SLOTS[0] + asked.start - CLASS_BASE - 1
    classes[classes == CLASS_BASE] = NOISE  # which detection reads too, and which is no class
    return found
