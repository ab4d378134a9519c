"""Examples as tokens of a prompt, which is answered by `pix2seq.tokenizers.slots`.

    task  slot y0 x0 y1 x1  ...

Each example is an object of a slot, by its box in what the sequence reads at the example's place.

Converts to ids, without model or I/O. Boxes are `yxyx` in [0, 1] of what the model sees; shapes use E examples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.slots import KINDS
from pix2seq.vocab import Vocab

TOKENS_PER_EXAMPLE = 5


def example_prompt(
    task_id: int, slots: NDArray[np.integer], boxes_yxyx: NDArray[np.floating], vocab: Vocab
) -> NDArray[np.int64]:
    """Return the prompt (1 + 5 E,) of examples: their slots (E,), numbers from 0, and boxes (E, 4)."""
    ids = np.column_stack([KINDS[0] + slots, vocab.coord_ids(boxes_yxyx)])
    return np.append(task_id, ids.ravel()).astype(np.int64)
