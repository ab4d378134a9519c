"""Caption scores: BLEU from nltk, CIDEr-D and ROUGE-L from pycocoevalcap if it is installed.

COCO's server tokenizes captions with Stanford's tokenizer, which needs Java. Here nltk does it with the same
conventions, so scores differ from published ones in the last digits. The result names the tokenization.

Reference: Papineni et al. 2002 (BLEU), arXiv 1411.5726 (CIDEr-D), Lin 2004 (ROUGE-L), and
arXiv 1504.00325 for how COCO uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pix2seq.errors import InputError
from pix2seq.metrics.calibration import NO_CLASS, Graded
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.types import Caption, Target

TOKENIZATION = "lower case, nltk's TreebankWordTokenizer, punctuation removed"

_MAX_ORDER = 4
_PUNCTUATION = re.compile("[-.?!,:;'\"`(){}\\[\\]\u2026\u2013\u2014]+")
_STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


@dataclass(frozen=True)
class CaptionScores(Scores):
    """BLEU-1 to BLEU-4 and ROUGE-L from 0 to 1, CIDEr-D from 0 to 10; None for what cannot be computed here.

    Where the annotations can tell, also `true`: the share of the images with a true caption.
    """

    num_images: int  # scored: those with a reference
    num_without_prediction: int  # of these; they count as empty captions
    tokenization: str = TOKENIZATION  # of references and predictions alike

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "metrics": self.metrics,
            "num_images": self.num_images,
            "num_without_prediction": self.num_without_prediction,
            "tokenization": self.tokenization,
        }

    def summary(self) -> str:
        """Return BLEU-4 and, where they are defined, CIDEr-D, ROUGE-L and the share of true captions in one line."""
        names = ["BLEU-4", *(name for name in ("CIDEr-D", "ROUGE-L", "true") if self.metrics.get(name) is not None)]
        return Scores({name: self.metrics[name] for name in names}).summary()

    def text(self) -> str:
        """Return a table for the terminal."""
        show = lambda value: "    -" if value is None else f"{value:5.3f}"  # noqa: E731
        lines = [f"{name:<7}  {show(value)}" for name, value in self.metrics.items()]
        lines.append(f"{self.num_images} images, {self.num_without_prediction} of them without a prediction")
        lines.append(f"words: {self.tokenization}")
        return "\n".join(lines)


class CaptionMetric(Metric):
    """Scores of one caption an image.

    `is_true_of` says whether a caption is true of an annotated image, and None where the annotations cannot tell.
    """

    def __init__(self, is_true_of: Callable[[str, Target], bool | None]) -> None:
        self.references: dict[int, tuple[str, ...]] = {}
        self.predictions: dict[int, str] = {}
        self.is_true_of = is_true_of
        self.verdicts: dict[int, bool] = {}
        self.confidences: dict[int, float] = {}

    def add(self, target: Target, answers: Sequence[Caption]) -> None:
        """See `Metric`."""
        self.references[target.image.id] = target.captions
        for caption in answers:
            self.predictions[target.image.id] = caption.text
            self.confidences[target.image.id] = caption.confidence
        verdict = self.is_true_of(self.predictions.get(target.image.id, ""), target)
        if verdict is not None:
            self.verdicts[target.image.id] = verdict

    def merge(self, other: CaptionMetric) -> None:
        """See `Metric`."""
        self.references |= other.references
        self.predictions |= other.predictions
        self.verdicts |= other.verdicts
        self.confidences |= other.confidences

    def result(self) -> CaptionScores:
        """See `Metric`."""
        scores = caption_scores(self.references, self.predictions)
        if not self.verdicts:
            return scores
        asked = [image_id for image_id in self.verdicts if image_id in self.confidences]
        nothing = np.full(len(asked), NO_CLASS)
        graded = Graded(
            np.array([self.confidences[image_id] for image_id in asked], np.float64),
            np.array([self.verdicts[image_id] for image_id in asked], np.bool_),
            np.array(asked, np.int64),
            nothing,
            nothing,
            len(self.verdicts),
        )
        share = sum(self.verdicts.values()) / len(self.verdicts)
        return replace(scores, metrics=scores.metrics | {"true": share}, graded=graded)


def caption_scores(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> CaptionScores:
    """Score one caption per image against its references; both mappings are by image id.

    An image without a prediction counts as an empty caption, which scores 0. Images without a reference
    that has words are left out. BLEU is for the corpus and not smoothed: without a common 4-gram, BLEU-4 is 0.
    CIDEr-D weights words by their rarity in these images, so it depends on the data set, and is undefined for
    one image. Raises `InputError` for predictions of unknown images.
    """
    unknown = [image_id for image_id in predictions if image_id not in references]
    if unknown:
        some = ", ".join(map(str, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise InputError(
            f"{len(unknown)} of {len(predictions)} predicted captions are for images that the references do not have "
            f"(ids {some}); score them against the split they were predicted on"
        )
    truths: list[list[list[str]]] = []
    guesses: list[list[str]] = []
    missing = 0
    for image_id, captions in references.items():
        truth = [words for words in map(caption_words, captions) if words]
        if truth:
            truths.append(truth)
            guesses.append(caption_words(predictions.get(image_id, "")))
            missing += image_id not in predictions
    return CaptionScores(_corpus_bleu(truths, guesses) | _cider_and_rouge(truths, guesses), len(truths), missing)


def caption_words(text: str) -> list[str]:
    """Return the words to score: lower case, `don't` as `do n't`, without punctuation."""
    from nltk.tokenize import TreebankWordTokenizer  # nltk takes seconds to import

    text = text.lower().translate(_STRAIGHT_QUOTES)
    # Treebank's rules split only the last full stop, because they expect a single sentence.
    text = re.sub(r"\.(?=\s)", " . ", text)
    return [word for word in TreebankWordTokenizer().tokenize(text) if not _PUNCTUATION.fullmatch(word)]


def _corpus_bleu(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, float | None]:
    from nltk.translate.bleu_score import brevity_penalty, closest_ref_length, modified_precision

    scores: dict[str, float | None] = {f"BLEU-{n}": None for n in range(1, _MAX_ORDER + 1)}
    if not references:
        return scores
    # nltk's corpus_bleu counts one wrong n-gram for each prediction shorter than n words; the paper and COCO's
    # scorer count none. It also warns and returns 1e-77 instead of 0. So only its parts are used.
    matches, total = [0] * _MAX_ORDER, [0] * _MAX_ORDER
    for truth, guess in zip(references, predictions, strict=True):
        for n in range(1, min(_MAX_ORDER, len(guess)) + 1):
            matches[n - 1] += modified_precision(truth, guess, n).numerator
            total[n - 1] += len(guess) - n + 1
    num_words = sum(map(len, predictions))
    closest = sum(closest_ref_length(truth, len(guess)) for truth, guess in zip(references, predictions, strict=True))
    penalty = brevity_penalty(closest, num_words)
    product = 1.0
    for n in range(1, _MAX_ORDER + 1):
        product *= matches[n - 1] / total[n - 1] if total[n - 1] else 0.0
        scores[f"BLEU-{n}"] = penalty * product ** (1 / n)
    return scores


def _cider_and_rouge(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {"CIDEr-D": None, "ROUGE-L": None}
    if not references:
        return scores
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        return scores
    truths = {image: [" ".join(words) for words in truth] for image, truth in enumerate(references)}
    guesses = {image: [" ".join(words)] for image, words in enumerate(predictions)}
    scores["ROUGE-L"] = float(Rouge().compute_score(truths, guesses)[0])
    if len(references) > 1:
        scores["CIDEr-D"] = float(Cider().compute_score(truths, guesses)[0])
    return scores
