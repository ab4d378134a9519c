"""A phrase as tokens of a prompt, which is answered by `pix2seq.tokenizers.slots`, or as the answer.

    task  slot  word ...  SEPARATOR
    task  y0 x0 y1 x1  SEPARATOR  |  word ...  end

The second is learned beside the first: which words describe the object in a box.

Converts to ids, without model or I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import EOS, SEPARATOR, Vocab

EXTRA_TOKENS = 3  # of a prompt, beside the words


def phrase_prompt(task_id: int, slot: int, text_ids: Sequence[int], vocab: Vocab) -> NDArray[np.int64]:
    """Return a prompt (3 + W,) of a slot's id and the W ids of a phrase, from 0 as a text tokenizer gives them."""
    return np.array([task_id, slot, *(vocab.text_base + each for each in text_ids), SEPARATOR], np.int64)


def description_prompt(task_id: int, box_yxyx: NDArray[np.floating], vocab: Vocab) -> NDArray[np.int64]:
    """Return the prompt (6,) that asks for a description of the object in a box (4,), `yxyx` in [0, 1]."""
    return np.array([task_id, *vocab.coord_ids(box_yxyx), SEPARATOR], np.int64)


def description(text_ids: Sequence[int], vocab: Vocab) -> NDArray[np.int64]:
    """Return the response (W + 1,) of the W ids of a phrase, from 0 as a text tokenizer gives them."""
    return np.array([*(vocab.text_base + each for each in text_ids), EOS], np.int64)
