"""The reward of a caption: CIDEr-D against the references of its image, with fixed document frequencies.

Reference: arXiv 1411.5726. `pix2seq.metrics.captions` has the metric, which takes the frequencies from the captions
that it scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pix2seq.metrics.captions import caption_words

MAX_ORDER = 4  # words of an n-gram
LENGTH_SIGMA = 6.0  # words
Ngram = tuple[str, ...]


class CiderD:
    """CIDEr-D, 0 to 10, with the document frequencies of a training split."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        """`captions` are those of each image, which are one document."""
        self.frequencies: Counter[Ngram] = Counter()
        num_images = 0
        for texts in captions:
            self.frequencies.update({ngram for text in texts for ngram in _ngrams(caption_words(text))})
            num_images += 1
        self.log_images = math.log(max(num_images, 1))

    def __call__(self, text: str, references: Sequence[str]) -> float:
        """Score a caption by its references; 0 without any."""
        if not references:
            return 0.0
        words = caption_words(text)
        return (
            10 / MAX_ORDER * sum(self._similarity(words, caption_words(each)) for each in references) / len(references)
        )

    def _similarity(self, words: Sequence[str], reference: Sequence[str]) -> float:
        """Return the sum over n of the cosines of TF-IDF vectors, clipped and with a penalty for another length."""
        ours, theirs = self._vector(words), self._vector(reference)
        total = 0.0
        for n in range(1, MAX_ORDER + 1):
            norms = math.prod(
                math.hypot(*(v for ngram, v in each.items() if len(ngram) == n)) for each in (ours, theirs)
            )
            shared = sum(min(v, theirs[k]) * theirs[k] for k, v in ours.items() if len(k) == n and k in theirs)
            total += shared / norms if norms else 0.0
        # The official scorer takes the number of bigrams for the length; the difference is the same.
        difference = max(len(words) - 1, 0) - max(len(reference) - 1, 0)
        return total * math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))

    def _vector(self, words: Sequence[str]) -> dict[Ngram, float]:
        counts = Counter(_ngrams(words))
        return {k: count * (self.log_images - math.log(max(self.frequencies[k], 1))) for k, count in counts.items()}


def _ngrams(words: Sequence[str]) -> list[Ngram]:
    return [tuple(words[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(words) - n + 1)]
