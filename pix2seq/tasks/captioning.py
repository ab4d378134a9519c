"""The captioning task: a sentence about the whole image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.model.decoding.generate import Generated, GenerationConfig
from pix2seq.model.decoding.grammar import TextGrammar
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.captioning import decode_caption, drop_inputs, encode_caption
from pix2seq.tokenizers.text import SentencePieceTokenizer, TextTokenizer, WordTokenizer
from pix2seq.types import Target
from pix2seq.vocab import PAD, TASK_IDS, Vocab


@dataclass(frozen=True)
class CaptioningConfig(TaskConfig):
    """How captioning is trained and asked."""

    tokenizer: str = "words"  # words (nltk), sentencepiece (trained on the captions), or a sentencepiece model file
    text_size: int = 8000  # most words or pieces of a vocabulary that is made from the captions
    min_count: int = 1  # times a word must appear to get into it
    captions_per_image: int = 5  # of an image in a training step
    max_tokens: int = 128  # of a caption, end included
    eos_weight: float = 0.1  # loss weight of the end token
    input_drop: float = 0.5  # share of the words that the decoder reads as the noise token

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 2 or self.captions_per_image < 1:
            raise ValueError("captioning.max_tokens must be at least 2 and captioning.captions_per_image at least 1")
        if not 0 <= self.input_drop < 1:
            raise ValueError(f"captioning.input_drop must lie in [0, 1), got {self.input_drop}")


def make_tokenizer(config: CaptioningConfig, captions: Iterable[str]) -> TextTokenizer:
    """The tokenizer that a config asks for, made from training captions or read from a file."""
    if config.tokenizer == "words":
        return WordTokenizer.build(captions, min_count=config.min_count, max_size=config.text_size)
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer.train(captions, config.text_size)
    path = Path(config.tokenizer)
    if not path.is_file():
        raise InputError(
            f"captioning.tokenizer is {config.tokenizer!r}; expected words, sentencepiece or a sentencepiece model file"
        )
    return SentencePieceTokenizer.from_file(path)


def with_text(vocab: Vocab, text: TextTokenizer) -> Vocab:
    """The vocabulary, made large enough for a tokenizer's ids."""
    return vocab.with_text(text.size)


class Captioning(Task[CaptioningConfig]):
    """Sentences."""

    name = "captioning"
    config_type = CaptioningConfig
    scale_range = (0.3, 2.0)
    learns_from = "caption"
    length_setting = "captioning.max_tokens"

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model's text."""
        if self.text is None:
            raise ValueError("captioning needs a text tokenizer")
        return self.text

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""
        return 1 + self.config.max_tokens

    def samples(self, target: Target) -> list[int | None]:
        """Whole images with a caption."""
        return [None] if target.captions else []

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """A sequence for each of up to `captions_per_image` captions, drawn at random."""
        found = []
        for i in rng.permutation(len(target.captions))[: self.config.captions_per_image]:
            ids = encode_caption(target.captions[i], self.tokenizer, self.vocab, max_tokens=self.config.max_tokens)
            weights = np.ones(len(ids), np.float32)
            weights[-1] = self.config.eos_weight
            inputs = drop_inputs(ids, self.config.input_drop, rng)
            found.append(Example(self.prompt(), inputs, ids, weights))
        return found

    def prompt(self) -> NDArray[np.int64]:
        """The task's id, (1,)."""
        return np.array([TASK_IDS[self.name]], np.int64)

    @property
    def max_new_tokens(self) -> int:
        """Length of the longest response."""
        return self.config.max_tokens

    @property
    def eos_id(self) -> int:
        """The id that ends a caption."""
        return self.vocab.text_base + self.tokenizer.eos_id

    def grammar(self) -> TextGrammar:
        """Text, and an end after at least one token of it."""
        return TextGrammar(
            first_piece=self.vocab.text_base + self.tokenizer.first_piece,
            text_end=self.vocab.text_base + self.tokenizer.size,
            eos_id=self.eos_id,
            max_tokens=self.max_new_tokens,
        )

    def generation(self) -> GenerationConfig:
        """See `Task`."""
        return GenerationConfig(self.max_new_tokens, grammar=self.grammar(), eos_id=self.eos_id, **self.sampling)

    def caption(self, out: Generated, row: int) -> tuple[str, float]:
        """Text of a row and its score, the mean log-probability of its tokens, end included."""
        ids = out.tokens[row].cpu().numpy()
        counted = ids != PAD
        logprobs = out.logprobs[row].double().cpu().numpy()[counted]
        score = float(logprobs.mean()) if len(logprobs) else float("-inf")
        return decode_caption(ids, self.tokenizer, self.vocab), score
