"""What generation is asked for and what it returns, in NumPy: tasks and `pix2seq.runtime` use it without torch.

Shapes: S samples of a prompt, T' new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.model.decoding.grammar import Grammar


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt, and what to return besides tokens."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    grammar: Grammar | None = None  # masks ids that would not parse, even if logits are NaN or infinite
    eos_id: int | None = 0  # ends a row; with None, only `max_new_tokens` does
    # Return the likeliest id in [low, high) and its log-probability too. Detection scores objects with them,
    # because the sampled class may be noise.
    score_range: tuple[int, int] | None = None
    score_steps: tuple[int, int] = (1, 0)  # (period, phase): score only steps t with t % period == phase
    # Without log-probabilities, steps that are not scored need no softmax over the vocabulary, and only the part
    # of a large output layer that the grammar allows.
    with_logprobs: bool = True
    score_without: int | None = None  # compute log-probabilities as if this id were impossible
    score_allowed: bool = False  # compute them as if what the grammar forbids were impossible

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):  # NaN is none of these
            raise ValueError(
                f"sampling needs temperature >= 0, top_k >= 0 and top_p in (0, 1], got temperature={self.temperature}, "
                f"top_k={self.top_k}, top_p={self.top_p}"
            )

    def is_scored(self, step: int) -> bool:
        """Return whether a step, counted from 0, is scored."""
        return self.score_range is not None and step % self.score_steps[0] == self.score_steps[1]


@dataclass(frozen=True)
class Completion:
    """The S continuations of one prompt as NumPy arrays, padded to the longest in the batch. See `Generated`."""

    tokens: NDArray[np.int64]  # (S, T')
    logprobs: NDArray[np.float32]  # (S, T')
    best_tokens: NDArray[np.int64] | None  # (S, T')
    best_logprobs: NDArray[np.float32] | None  # (S, T')
    truncated: NDArray[np.bool_]  # (S,)
    embedding: NDArray[np.float32] | None = None  # (E,) in place of continuations, where that was asked for

    @classmethod
    def of_embedding(cls, embedding: NDArray[np.float32]) -> Completion:
        """Return the answer to a prompt that was not continued but embedded."""
        nothing = np.zeros((0, 0), np.int64)
        return cls(nothing, nothing.astype(np.float32), None, None, np.zeros(0, np.bool_), embedding)

    def steps(self, start: int, stop: int) -> Completion:
        """Return the tokens of some steps only."""
        return Completion(
            self.tokens[:, start:stop],
            self.logprobs[:, start:stop],
            None if self.best_tokens is None else self.best_tokens[:, start:stop],
            None if self.best_logprobs is None else self.best_logprobs[:, start:stop],
            self.truncated,
        )

    def split(self, num_parts: int) -> list[Completion]:
        """Return equal parts, such as the samples of each prompt where those of several lie side by side."""
        values = (self.tokens, self.logprobs, self.best_tokens, self.best_logprobs, self.truncated)
        parts: list[list[Any]] = [[None] * num_parts if x is None else np.split(x, num_parts) for x in values]
        return [Completion(*each) for each in zip(*parts, strict=True)]


def is_greedy(temperature: float, top_k: int) -> bool:
    """Return whether sampling always takes the largest logit."""
    return temperature == 0 or top_k == 1
