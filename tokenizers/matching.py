"""Does a sentence fit the image? As tokens.

    task  text ...  end  ->  YES or NO

The text and its end token are those of `pix2seq.tokenizers.captioning`. No model and no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.captioning import decode_caption
from pix2seq.vocab import NO, YES, Vocab

if TYPE_CHECKING:
    from pix2seq.tokenizers.text import TextTokenizer


def match_prompt(task_id: int, sentence: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the prompt (1 + L,) that asks about a sentence (L,), its end token included."""
    return np.append(task_id, sentence).astype(np.int64)


def match_answer(is_true: bool) -> NDArray[np.int64]:
    """Return the response (1,)."""
    return np.array([YES if is_true else NO])


def decode_prompt(prompt: NDArray[np.integer], tokenizer: TextTokenizer, vocab: Vocab) -> str:
    """Return the sentence that a prompt asks about. Never raises, for any ids."""
    return decode_caption(prompt[1:], tokenizer, vocab)
