"""Objects of slots as tokens, in two steps. First all objects of an image are listed, whatever they are:

    task  |  y0 x0 y1 x1 OBJECT-or-NOISE  ...  end

Then each is compared with what slots stand for, which the prompt says. The answer is its slot, or noise for none:

    task  what the slots stand for  y0 x0 y1 x1  |  slot-or-NOISE

Of what was found, an outline can be asked for:

    task  y0 x0 y1 x1  |  rings, end

The first slot stands for any object, in a list. A prompt gives the others their meaning: they are `KINDS`, and counted
from 0. Rings are those of `pix2seq.tokenizers.segmentation`.

Converts to ids and back, without model or I/O. Boxes are `yxyx` in [0, 1] of what the model sees; shapes use N objects,
L tokens of a list and P tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import replace

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

OBJECT = SLOTS[0]
KINDS = SLOTS[1:]
NO_SLOT = -1  # of an object that the prompt does not ask for
NONE = -1  # in place of a choice


def encode_list(
    boxes_yxyx: NDArray[np.floating],
    is_object: NDArray[np.bool_],
    vocab: Vocab,
    rng: np.random.Generator,
    *,
    eos_weight: float,
) -> DetectionResponse:
    """Serialise boxes (N, 4), with an object in them or not (N,), in the given order, and an end.

    As in detection, the decoder reads `OBJECT` or noise with equal odds in place of what is true, and boxes without an
    object have no loss on coordinates.
    """
    labels = np.where(is_object, 1, NOISE_LABEL)
    response = encode_objects(boxes_yxyx, labels, vocab, rng, num_labels=1, eos_weight=eos_weight)
    return replace(response, inputs=_with_objects(response.inputs), targets=_with_objects(response.targets))


def decode_list(
    ids: NDArray[np.integer], best_ids: NDArray[np.integer], logprobs: NDArray[np.floating], vocab: Vocab
) -> DecodedObjects:
    """Read objects from any ids (L,), see `decode_objects`."""
    return decode_objects(ids, best_ids - OBJECT + CLASS_BASE + 1, logprobs, vocab)


def comparison_prompt(asked: NDArray[np.integer], box_yxyx: NDArray[np.floating], vocab: Vocab) -> NDArray[np.int64]:
    """Return the prompt (P + 4,) about the object in a box (4,); `asked` (P,) says what slots stand for."""
    return np.append(asked, vocab.coord_ids(box_yxyx)).astype(np.int64)


def outline_prompt(task_id: int, box_yxyx: NDArray[np.floating], vocab: Vocab) -> NDArray[np.int64]:
    """Return the prompt (5,) that asks for the outline of the object in a box (4,)."""
    return np.append(task_id, vocab.coord_ids(box_yxyx)).astype(np.int64)


def comparison_choices(asked: range) -> NDArray[np.int64]:
    """Return the `choices` (1, 4) of an answer: the kinds of the prompt, or noise."""
    return np.array([[KINDS[0] + asked.start, KINDS[0] + asked.stop, NOISE, NONE]])


def _with_objects(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a response of detection (L,) with `OBJECT` in place of its only class."""
    found = ids.copy()
    classes = found[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT]
    classes[classes == CLASS_BASE] = NOISE  # which detection reads too, and which is no class
    classes[classes == CLASS_BASE + 1] = OBJECT
    return found
