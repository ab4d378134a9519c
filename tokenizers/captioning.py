"""Captions as a language: text, then the end of the text.

A caption has an end token of its own, text id 1 in the published vocabulary, so 3001; padding 0
follows. No model and no I/O.

Reference: arXiv 2206.07669, section 3, and google-research/pix2seq, `tasks/captioning.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.text import TextTokenizer
from pix2seq.vocab import NOISE, PAD, Vocab


def encode_caption(text: str, tokenizer: TextTokenizer, vocab: Vocab, *, max_tokens: int = 128) -> NDArray[np.int64]:
    """Vocabulary ids (L,) of a caption and its end, 1 <= L <= max_tokens; a longer caption is cut before the end.

    The official code cuts the end as well, which teaches the model that long captions have none.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a caption needs at least 1 for its end")
    if tokenizer.size > vocab.num_text:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, but the vocabulary only {vocab.num_text} for text")
    ids = [*tokenizer.encode(text)[: max_tokens - 1], tokenizer.eos_id]
    return np.array(ids, np.int64) + vocab.text_base


def decode_caption(ids: NDArray[np.integer], tokenizer: TextTokenizer, vocab: Vocab) -> str:
    """The text of generated ids (L,), up to padding or the end of the text. Never raises, whatever the ids.

    Ids that are no text are skipped; the official code clips them to the first or last text id, so
    that a coordinate reads as a piece of text.
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

    Published with a rate of 0.5, so that words are learnt from the image and not from the words
    before. Targets and weights stay. The official code drops the prompt's token too, as if it were a word;
    here the caller decides what it passes.
    """
    return np.where(rng.random(inputs.shape) < rate, NOISE, inputs).astype(np.int64)
