"""The matching task: is a sentence true of an image?

False sentences are those of other images, and the image's own with one word changed. Of generated images it is known
whether a sentence is false (`pix2seq.data.shapes.truth`); elsewhere, sentences of other images are taken for false, and
so are changed ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np

from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.metrics.sentences import Examined, SentenceMetric, Statement
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import RangeGrammar
from pix2seq.settings import PositiveInt, Range
from pix2seq.tasks.request import EncodedImage, Request
from pix2seq.tasks.sentences import SentenceConfig, SentenceTask
from pix2seq.tasks.word_changes import KINDS, WordChanges, plural
from pix2seq.tokenizers.matching import decode_prompt, match_answer, match_prompt
from pix2seq.tokenizers.text import TextTokenizer
from pix2seq.types import Category, Match, Target, text_key
from pix2seq.vocab import NO, YES, Vocab

if TYPE_CHECKING:
    from pix2seq.data.shapes.truth import Facts
    from pix2seq.drawing import Canvas

TRIES = 20  # to draw a false sentence
MAX_EXPONENT = 700.0  # beyond it, exp overflows
Sentences = Annotated[int, Range(least=0, most=1000)]


@dataclass(frozen=True)
class MatchingConfig(SentenceConfig):
    """How matching is trained."""

    section = "matching"

    # Of an image in a training step: true sentences, false ones of other images, and false ones by one changed word.
    # All false ones together weigh as much as the true ones.
    num_true: PositiveInt = 2
    num_others: Sentences = 1
    num_changed: Sentences = 2
    max_tokens: Annotated[int, Range(least=2, most=10_000)] = 64  # of a sentence, end included


@dataclass(frozen=True)
class Exam:
    """What evaluation asks about an image."""

    statements: tuple[Statement, ...]


class Matching(SentenceTask[MatchingConfig]):
    """True or false?"""

    name = "matching"
    config_type = MatchingConfig
    main_metric = "accuracy"
    scale_range = (0.3, 1.0)  # the whole image, of which sentences are true
    length_setting = "matching.max_tokens"
    tells_sentences = True
    about_format = "sentences, separated by semicolons"

    def __init__(
        self, config: MatchingConfig, vocab: Vocab, categories: Sequence[Category], text: TextTokenizer | None = None
    ) -> None:
        super().__init__(config, vocab, categories, text)
        self._captions: Sequence[str] = ()
        self._names: dict[int, str] = {}
        self._changes: WordChanges | None = None

    def with_data(self, captions: Sequence[str], categories: Sequence[Category]) -> Self:
        """See `Task`."""
        task = copy.copy(self)
        task._captions, task._names = captions, {category.label: category.name for category in categories}
        task._changes = WordChanges(task._names.values(), self._knows)
        return task

    def _knows(self, word: str) -> bool:
        return all(token >= self.tokenizer.first_piece for token in self.tokenizer.encode(word))

    @property
    def max_seq_len(self) -> int:
        """See `Task`."""
        return 1 + self.config.max_tokens

    # Learning

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return a sequence for each sentence.

        There is none if a false one is not known to be false, because the input shows a part of a generated image.
        """
        from pix2seq.data.targets import shown_whole  # here, because asking needs no data

        seen = shown_whole(target, size) if target.attributes else target
        if seen is None:
            return []
        facts = self._facts(seen)
        own = [text for text in target.captions if facts is None or facts.say(text)]
        true = [own[i] for i in rng.permutation(len(own))[: self.config.num_true]]
        if not true:
            return []
        is_false = partial(_is_false, facts=facts, own={text_key(text) for text in target.captions})
        drawn = [self._other(is_false, rng) for _ in range(self.config.num_others)]
        drawn += [
            self._falsified(true[i % len(true)], seen, is_false, rng, known=facts is not None)
            for i in range(self.config.num_changed)
        ]
        false = [text for text in drawn if text is not None]
        found = [self._example(text, True, 1.0) for text in true]
        return found + [self._example(text, False, len(true) / len(false)) for text in false]

    def _facts(self, target: Target) -> Facts | None:
        from pix2seq.data.shapes.truth import facts_of

        return facts_of(target, names=self._names)

    def _example(self, text: str, is_true: bool, weight: float) -> Example:
        sentence = self.encode(text)
        prompt, answer = match_prompt(self.vocab.task_id(self.name), sentence), match_answer(is_true)
        return Example(prompt, answer, answer, np.array([weight], np.float32), sentence=sentence if is_true else None)

    def _other(self, is_false: Callable[[str], bool], rng: np.random.Generator) -> str | None:
        """Draw a false sentence among those of all images."""
        for _ in range(TRIES if len(self._captions) else 0):
            text = self._captions[int(rng.integers(len(self._captions)))]
            if is_false(text):
                return text
        return None

    def _falsified(
        self,
        text: str,
        target: Target,
        is_false: Callable[[str], bool],
        rng: np.random.Generator,
        *,
        known: bool,
        kinds: Sequence[str] = KINDS,
    ) -> str | None:
        """Draw a change of one word, of one of the `kinds`, that makes a sentence false.

        Where that is not `known`, words for objects that the image has are avoided.
        """
        assert self._changes is not None
        possible = [kind for kind in self._changes.kinds(text) if kind in kinds]
        present = [] if known else [self._names.get(label, "").lower() for label in target.labels.tolist()]
        avoid = {word for name in present for word in (name, plural(name))}
        for _ in range(TRIES if possible else 0):
            changed = self._changes.draw(text, possible[int(rng.integers(len(possible)))], rng, avoid=avoid)
            if changed is not None and is_false(changed):
                return changed
        return None

    # Asking and answering

    def requests(self, image: EncodedImage, about: Sequence[str] | Exam | None) -> list[Request]:
        """Ask about each sentence; in an exam, ask for the embeddings of the true ones too, if there are any."""
        if about is None:
            raise InputError(f"{self.name} is asked about sentences; give some")
        if not isinstance(about, Exam):
            return [self._match(text, text) for text in about]
        asked = [self._match(statement.text, statement) for statement in about.statements]
        if image.embedding is None:
            return asked
        true = [request for request in asked if request.subject.is_true]
        return asked + [replace(request, prompt=request.prompt[1:], embeds=True) for request in true]

    def _match(self, text: str, subject: Any) -> Request:
        """Ask for the probabilities of YES and NO.

        The answer is forced to be YES and NO is scored beside it, so that both are known whichever is likelier.
        """
        generation = GenerationConfig(
            1, temperature=0.0, grammar=RangeGrammar(YES, YES), score_range=(NO, NO + 1), eos_id=None
        )
        prompt = match_prompt(self.vocab.task_id(self.name), self.encode(text))
        return Request(prompt, generation, subject=subject, expected_tokens=len(prompt))

    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Return a match for each sentence; of an exam its results."""
        asked = list(zip(requests, completions, strict=True))
        scores = [_probability(completion) for request, completion in asked if not request.embeds]
        if not requests or isinstance(requests[0].subject, str):
            return [Match(request.subject, score) for (request, _), score in zip(asked, scores, strict=True)]
        embeddings = [c.embedding for request, c in asked if request.embeds and c.embedding is not None]
        return [
            Examined(
                tuple(request.subject for request in requests if not request.embeds),
                np.array(scores),
                None if image.embedding is None else np.asarray(image.embedding, np.float32),
                np.array(embeddings, np.float32),
            )
        ]

    def parse_about(self, text: str) -> list[str]:
        """Read `a red star; a person`."""
        return [part for part in map(str.strip, text.split(";")) if part]

    def check_about(self, image: EncodedImage, about: Any) -> Sequence[str] | Exam:
        """Check that sentences are given. Raises `InputError` for anything else, and for one without words."""
        if isinstance(about, Exam):
            return about
        if (
            isinstance(about, str)
            or not isinstance(about, Sequence)
            or not all(isinstance(each, str) for each in about)
        ):
            raise InputError(f"{self.name} is asked about a list of sentences, got {type(about).__name__}")
        if not all(each.strip() for each in about):
            raise InputError("a sentence to match has no words; leave it out")
        return about

    # Showing and measuring

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Exam]:
        """Ask about the captions, a sentence of another image, and a changed caption of each kind of word.

        What is drawn for an image depends on the image and on the captions of the data set.
        """
        if not target.captions:
            return {}
        rng = np.random.default_rng(target.image.id % 2**64)
        facts = self._facts(target)
        is_false = partial(_is_false, facts=facts, own={text_key(text) for text in target.captions})
        statements = [Statement(text) for text in target.captions]
        other = self._other(is_false, rng)
        if other is not None:
            statements.append(Statement(other, "other"))
        for kind in KINDS if self._changes is not None else ():
            for i in rng.permutation(len(target.captions)).tolist():
                text = target.captions[i]
                changed = self._falsified(text, target, is_false, rng, known=facts is not None, kinds=[kind])
                if changed is not None:
                    statements.append(Statement(changed, kind, i))
                    break
        return {"": Exam(tuple(statements))}

    def metric(self, categories: Sequence[Category]) -> SentenceMetric:
        """See `Task`."""
        from pix2seq.data.shapes.truth import facts_of

        return SentenceMetric(partial(facts_of, names={category.label: category.name for category in categories}))

    def draw(self, canvas: Canvas, answers: Sequence[Match]) -> None:
        """Write the sentences below the image, each with its score."""
        canvas.text(" / ".join(f"{match.text} {match.score:.2f}" for match in answers))

    def summary(self, example: Example) -> str:
        """Return the sentence and whether it is true."""
        answer = self.vocab.meaning(int(example.targets[0]))
        return f"{decode_prompt(example.prompt, self.tokenizer, self.vocab)} ({answer})"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Match]:
        """See `Task`."""
        text = decode_prompt(example.prompt, self.tokenizer, self.vocab)
        return [Match(text, float(example.targets[0] == YES))]


def _is_false(text: str, *, facts: Facts | None, own: Collection[str]) -> bool:
    """Whether a sentence is false of an image: by its facts, or else because the image's `own` ones do not say it."""
    return text_key(text) not in own if facts is None else not facts.say(text)


def _probability(completion: Completion) -> float:
    """Return the probability of YES among YES and NO."""
    assert completion.best_logprobs is not None
    yes, no = float(completion.logprobs[0, 0]), float(completion.best_logprobs[0, 0])
    return 0.5 if yes == no else 1 / (1 + math.exp(min(no - yes, MAX_EXPONENT)))
