"""What tasks that learn from captions have in common: how text becomes tokens, and what is true of mirrored images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.settings import PositiveInt, Range
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.captioning import encode_caption
from pix2seq.tokenizers.text import SentencePieceTokenizer, TextTokenizer, WordTokenizer
from pix2seq.types import Target
from pix2seq.vocab import MAX_SIZE


@dataclass(frozen=True)
class SentenceConfig(TaskConfig):
    """How captions are read."""

    # words (nltk), sentencepiece (trained on the captions), or a sentencepiece model file; the first task that reads
    # text decides for all
    tokenizer: str = "words"
    # Most words or pieces of a vocabulary that is made from the captions.
    text_size: Annotated[int, Range(least=1, most=MAX_SIZE)] = 8000
    min_count: PositiveInt = 1  # times a word must appear to get into it
    max_tokens: Annotated[int, Range(least=2, most=10_000)] = 128  # of a caption, end included
    # Mirrored images: auto leaves out captions that name a side, always keeps them, never: no flips.
    flip: Literal["auto", "always", "never"] = "auto"


Config = TypeVar("Config", bound=SentenceConfig)


class SentenceTask(Task[Config]):
    """A task that learns from captions."""

    learns_from = "caption"
    uses_classes = False
    reads_text = True

    @classmethod
    def make_text_tokenizer(
        cls, config: TaskConfig, captions: Sequence[str], words: Sequence[str] = ()
    ) -> TextTokenizer:
        """Make the tokenizer that the config asks for from captions and `words`, or read it from a file."""
        assert isinstance(config, SentenceConfig)
        if config.tokenizer == "words":
            return WordTokenizer.build(captions, min_count=config.min_count, max_size=config.text_size, required=words)
        if config.tokenizer == "sentencepiece":
            return SentencePieceTokenizer.train([*captions, *words], config.text_size)
        path = Path(config.tokenizer)
        if not path.is_file():
            raise InputError(
                f"{cls.name}.tokenizer is {config.tokenizer!r}; expected words, sentencepiece or a sentencepiece "
                "model file"
            )
        return SentencePieceTokenizer.from_file(path)

    def encode(self, sentence: str) -> NDArray[np.int64]:
        """Return the ids (L,) of a sentence and its end token, of which there are at most `max_tokens`."""
        return encode_caption(sentence, self.tokenizer, self.vocab, max_tokens=self.config.max_tokens)

    @property
    def flips(self) -> bool:
        """See `Task`."""
        return self.config.flip != "never"

    def after_flip(self, target: Target) -> Target:
        """See `Task`."""
        return target if self.config.flip == "always" else super().after_flip(target)
