"""Examples as tokens of a prompt, which is answered by `pix2seq.tokenizers.slots`.

    task  slot y0 x0 y1 x1 [SEPARATOR rings]  ...

Each example is an object of a slot, by its box in what the sequence reads at the example's place. The rings in brackets
are its outline in few points, those of `pix2seq.tokenizers.segmentation`.

Converts to ids, without model or I/O. Boxes are `yxyx` in [0, 1] of what the model sees; shapes use E examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.segmentation import TOKENS_PER_POINT, encode_short
from pix2seq.tokenizers.slots import KINDS
from pix2seq.vocab import Vocab

TOKENS_PER_EXAMPLE = 5  # without an outline

Rings = Sequence[NDArray[np.floating]]


def prompt_length(max_examples: int, short_points: int) -> int:
    """Return the length of the longest prompt; `short_points` are those of an outline, 0 if none is shown."""
    outline = 1 + TOKENS_PER_POINT * short_points if short_points else 0
    return 1 + max_examples * (TOKENS_PER_EXAMPLE + outline)


def example_prompt(
    task_id: int,
    slots: NDArray[np.integer],
    boxes_yxyx: NDArray[np.floating],
    vocab: Vocab,
    *,
    outlines: Sequence[Rings] = (),
    short_points: int = 0,
) -> NDArray[np.int64]:
    """Return the prompt (P,) of examples: their slots (E,), numbers from 0, and boxes (E, 4).

    `outlines` are the rings of each, none for an example that is shown by its box alone; () means that for all.
    """
    ids = [np.array([task_id])]
    shown = outlines or [()] * len(slots)
    for slot, box, rings in zip(slots, boxes_yxyx, shown, strict=True):
        ids += [KINDS[0] + slot[None], vocab.coord_ids(box)]
        if len(rings):
            ids.append(encode_short(rings, vocab, short_points))
    return np.concatenate(ids).astype(np.int64)
