"""A phrase as tokens of a prompt, which is answered by `pix2seq.tokenizers.slots`.

    task  slot  word ...  SEPARATOR

Converts to ids, without model or I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import SEPARATOR, Vocab

EXTRA_TOKENS = 3  # of a prompt, beside the words


def phrase_prompt(task_id: int, slot: int, text_ids: Sequence[int], vocab: Vocab) -> NDArray[np.int64]:
    """Return a prompt (3 + W,) of a slot's id and the W ids of a phrase, from 0 as a text tokenizer gives them."""
    return np.array([task_id, slot, *(vocab.text_base + each for each in text_ids), SEPARATOR], np.int64)
