"""Captions as tokens: the text, then its end token.

The end token of a caption is text id 1 in the published vocabulary, so 3001; padding 0 follows.
No model and no I/O.

Reference: arXiv 2206.07669, section 3, and google-research/pix2seq, `tasks/captioning.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import NOISE, PAD, Vocab

if TYPE_CHECKING:
    from pix2seq.tokenizers.text import TextTokenizer


def encode_caption(text: str, tokenizer: TextTokenizer, vocab: Vocab, *, max_tokens: int = 128) -> NDArray[np.int64]:
    """Return ids (L,) of a caption and its end token, 1 <= L <= max_tokens; a longer caption is cut before the end.

    The official code also cuts the end token, which teaches the model that long captions have none.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a caption needs at least 1 for its end")
    if tokenizer.size > vocab.num_text:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, but the vocabulary only {vocab.num_text} for text")
    ids = [*tokenizer.encode(text)[: max_tokens - 1], tokenizer.eos_id]
    return np.array(ids, np.int64) + vocab.text_base


def decode_caption(ids: NDArray[np.integer], tokenizer: TextTokenizer, vocab: Vocab) -> str:
    """Read the text of generated ids (L,), up to padding or the end token. Never raises, for any ids.

    Ids outside the text range are skipped; the official code clips them to the first or last text id,
    so it reads a coordinate as a piece of text.
    """
    text_ids: list[int] = []
    for token in ids.tolist():
        if token == PAD:
            break
        if 0 <= token - vocab.text_base < vocab.num_text:
            text_ids.append(token - vocab.text_base)
    return tokenizer.decode(text_ids)


def drop_inputs(inputs: NDArray[np.integer], rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Replace each token that the decoder reads by NOISE with probability `rate`; any shape.

    The published rate is 0.5, so that words are learned from the image and not from earlier words.
    Targets and weights stay. The official code also drops the prompt token as if it were a word; here
    the caller decides what to pass.
    """
    return np.where(rng.random(inputs.shape) < rate, NOISE, inputs).astype(np.int64)
