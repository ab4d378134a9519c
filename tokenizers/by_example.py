"""Finding objects like examples as tokens.

    task  slot y0 x0 y1 x1  ...  ->  y0 x0 y1 x1 slot  ...  [y0 x0 y1 x1 NOISE  ...]  end

A slot is a class that only the prompt says the meaning of: each example is an object of a slot, by its box in what the
sequence reads at the example's place. All objects of the slots are answered, then objects of no slot and boxes without
an object, which are noise. As in detection, the answer is the best slot of each box with its probability.

Converts to ids and back, without model or I/O. Boxes are `yxyx` in [0, 1] of what the model sees; shapes use E
examples, N objects and L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from pix2seq.vocab import CLASS_BASE, NOISE, SLOTS, Vocab

TOKENS_PER_EXAMPLE = 5


def example_prompt(
    task_id: int, slots: NDArray[np.integer], boxes_yxyx: NDArray[np.floating], vocab: Vocab
) -> NDArray[np.int64]:
    """Return the prompt (1 + 5 E,) of examples: their slots (E,), numbers from 0, and boxes (E, 4)."""
    ids = np.column_stack([SLOTS[0] + slots, vocab.coord_ids(boxes_yxyx)])
    return np.append(task_id, ids.ravel()).astype(np.int64)


def encode_found(
    boxes_yxyx: NDArray[np.floating],
    slots: NDArray[np.integer],
    is_object: NDArray[np.bool_],
    asked: Sequence[int],
    vocab: Vocab,
    rng: np.random.Generator,
    *,
    noise_weight: float,
    eos_weight: float,
) -> DetectionResponse:
    """Serialise boxes (N, 4) of slots (N,), numbers from 0 or -1 for none, in the given order, and an end.

    `asked` are the slots of the prompt. The decoder reads one of them or the noise class in place of each true class,
    with equal odds. Boxes without an object (`is_object`) have no loss on coordinates.
    """
    order = {slot: number for number, slot in enumerate(asked, start=1)}
    labels = np.array([order.get(slot, NOISE_LABEL) for slot in slots.tolist()], np.int64)
    plain = encode_objects(
        boxes_yxyx, labels, vocab, rng, num_labels=len(asked), noise_weight=noise_weight, eos_weight=eos_weight
    )
    # What is read may be `CLASS_BASE` itself, which is no class.
    to_slot = {CLASS_BASE: NOISE} | {CLASS_BASE + number: SLOTS[slot] for slot, number in order.items()}
    at_class = np.arange(len(labels)) * TOKENS_PER_OBJECT + TOKENS_PER_OBJECT - 1
    inputs, targets = plain.inputs.copy(), plain.targets.copy()
    for ids in (inputs, targets):
        ids[at_class] = [to_slot.get(token, token) for token in ids[at_class].tolist()]
    weights = plain.weights.copy()
    objects = weights[:-1].reshape(-1, TOKENS_PER_OBJECT)
    objects[is_object, : TOKENS_PER_OBJECT - 1] = 1.0
    return DetectionResponse(inputs, targets, weights)


def decode_found(
    ids: NDArray[np.integer],
    best_slots: NDArray[np.integer],
    logprobs: NDArray[np.floating],
    vocab: Vocab,
) -> DecodedObjects:
    """Read objects from any ids (L,), see `decode_objects`; labels are numbers of slots from 1."""
    return decode_objects(ids, best_slots - SLOTS[0] + CLASS_BASE + 1, logprobs, vocab)
