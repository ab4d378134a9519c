"""The task by words: a phrase is answered by the boxes of all objects that it names, none if there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import MAX_SHOWN, InputError
from pix2seq.examples import Example
from pix2seq.metrics.phrases import Asked, Found, PhraseMetric
from pix2seq.model.decoding.completion import Completion
from pix2seq.settings import NonNegativeInt, PositiveInt, Range, Share, ShareBelowOne
from pix2seq.tasks.objects import instance_at
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.slots import BOX_TOKENS, Meaning, SlotConfig, SlotTask, View
from pix2seq.tasks.task import TaskConfig
from pix2seq.tokenizers.by_words import EXTRA_TOKENS, description, description_prompt, phrase_prompt
from pix2seq.tokenizers.slots import KINDS, NO_SLOT
from pix2seq.tokenizers.text import UNKNOWN, TextTokenizer, WordTokenizer
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import NOISE, SEPARATOR

if TYPE_CHECKING:
    from pix2seq.data.phrases import PhraseMaker, Scene
    from pix2seq.drawing import Canvas

EXAM_SEED = 16  # of the phrases that evaluation asks for, with the image's id


@dataclass(frozen=True)
class ByWordsConfig(SlotConfig):
    """How finding objects by words is trained and asked."""

    section = "by_words"

    phrases: Annotated[int, Range(least=1, most=1000)] = 4  # of an image in a training step
    descriptions: NonNegativeInt = 2  # of objects of an image in a training step
    absent_share: Share = 0.5  # of the phrases, those that name nothing in the image
    unseen_share: ShareBelowOne = 0.0  # of the combinations of class, colour and texture that training leaves out
    max_words: Annotated[int, Range(least=1, most=10_000)] = 24  # text tokens of a phrase
    exam_phrases: PositiveInt = 6  # that evaluation asks of an image


@dataclass(frozen=True)
class Exam:
    """What evaluation asks about an image."""

    asked: tuple[Asked, ...]


class ByWords(SlotTask[ByWordsConfig]):
    """Which objects are meant?"""

    name = "by_words"
    config_type = ByWordsConfig
    main_metric = "AP50"
    hub_pipeline = "zero-shot-object-detection"
    length_setting = "by_words.max_objects (or max_words)"
    reads_text = True
    takes_words = True
    about_format = "phrases, separated by semicolons: `striped star; people in blue`"

    @classmethod
    def make_text_tokenizer(
        cls, config: TaskConfig, captions: Sequence[str], words: Sequence[str] = ()
    ) -> TextTokenizer:
        """See `Task`."""
        return WordTokenizer.build(captions, required=words)

    @classmethod
    def text_words(cls, categories: Sequence[Category], attributes: Sequence[Mapping[str, str]]) -> list[str]:
        """See `Task`: the words of phrases about such objects."""
        from pix2seq.data.phrases import phrase_words

        return phrase_words((category.name for category in categories), attributes)

    @property
    def max_prompt(self) -> int:
        """See `SlotTask`."""
        return EXTRA_TOKENS + self.config.max_words

    @property
    def sees_whole(self) -> bool:
        """See `SlotTask`: phrases speak of places in the image, and of other objects."""
        return True

    @property
    def num_references(self) -> int:
        """See `Task`: the closeup of the object."""
        return int(self.config.closeup)

    # Learning

    @cached_property
    def _maker(self) -> PhraseMaker:
        from pix2seq.data.phrases import PhraseMaker  # here, because asking needs no generator of images

        names = (category.name for category in self.categories.values())
        return PhraseMaker(names, self._is_readable, self.config.unseen_share)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {label: category.name for label, category in self.categories.items()}

    def _is_readable(self, text: str) -> bool:
        return len(_encoded(self.tokenizer, text)) <= self.config.max_words and not self._unknown_words(text)

    def _unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if UNKNOWN in self.tokenizer.decode(_encoded(self.tokenizer, word))]

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return the list of the image, comparisons with `phrases` phrases, and `descriptions`, all drawn at random."""
        from pix2seq.data.phrases import Scene

        scene = Scene.of(target, self._names, size)
        objects = self.objects(target, size, rng)
        found = [self.learned_list(target, size, rng), *self._descriptions(scene, objects, rng)]
        found += self.learned_outlines(target, objects, size, rng)
        for _ in range(self.config.phrases):
            drawn = self._maker.draw(scene, rng, absent=bool(rng.random() < self.config.absent_share))
            if drawn is not None:
                slot = int(rng.integers(len(KINDS)))
                slots = np.where(np.isin(np.arange(len(target.labels)), drawn.meant), slot, NO_SLOT)
                prompt = self._prompt(drawn.text, slot)
                found += self.learned_comparisons(prompt, slots, range(slot, slot + 1), objects, rng)
        return found

    def _descriptions(self, scene: Scene, objects: Mapping[int, View], rng: np.random.Generator) -> list[Example]:
        """Return sequences that say class, colour and texture of objects: it is learned sooner what words look like."""
        found = []
        for i in rng.permutation([*objects])[: self.config.descriptions].tolist():
            text = self._maker.description(scene.things[i])
            if text is not None:
                views = objects[i].views
                prompt = description_prompt(self.vocab.task_id(self.name), objects[i].box_yxyx, self.vocab)
                answer = description(_encoded(self.tokenizer, text), self.vocab)
                weights = np.ones(len(answer), np.float32)
                found.append(Example(prompt, answer, answer, weights, views[0].closeup, others=tuple(views[1:])))
        return found

    def _prompt(self, text: str, slot: int = 0) -> NDArray[np.int64]:
        return phrase_prompt(self.vocab.task_id(self.name), KINDS[slot], _encoded(self.tokenizer, text), self.vocab)

    # Asking and answering

    def meanings(self, image: EncodedImage, about: Sequence[str] | Exam | None) -> list[Meaning]:
        """Return what each phrase means. Raises `InputError` if there is none."""
        if about is None:
            raise InputError(f"{self.name} is asked about phrases; give some with --find, or Predictor.find")
        asked: Sequence[str | Asked] = about.asked if isinstance(about, Exam) else about
        outlined_from = inf if isinstance(about, Exam) else self.config.min_score  # exams are about boxes
        return [
            Meaning(self._prompt(_text(each)), (_text(each),), (number, each), outlined_from=outlined_from)
            for number, each in enumerate(asked, start=1)
        ]

    def told(self, meaning: Meaning, found: list[Instance]) -> list[Any]:
        """Return the objects of at least `min_score`, their class named by the phrase; of an exam all."""
        number, asked = meaning.subject
        if isinstance(asked, Asked):
            boxes = np.array([each.box_xyxy for each in found], np.float64).reshape(-1, 4)
            scores = np.array([each.score for each in found], np.float32)
            return [Found(asked, boxes, scores, self.config.min_score)]
        category = Category(number, number, asked)
        return [replace(each, category=category) for each in found if each.score >= self.config.min_score]

    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Return the objects of all phrases, best first; of an exam what was found of each phrase."""
        found = super().answers(image, requests, completions)
        return sorted(found, key=_order)

    def parse_about(self, text: str) -> list[str]:
        """Read `PHRASE; PHRASE ...`."""
        return [part.strip() for part in text.split(";") if part.strip()]

    def check_about(self, image: EncodedImage, about: Any) -> list[str] | Exam:
        """Check phrases. Raises `InputError` for none, an empty or a long one, and a word that the model never read."""
        if isinstance(about, Exam):
            return about
        phrases = [about] if isinstance(about, str) else about
        if not isinstance(phrases, Sequence) or not all(isinstance(each, str) for each in phrases):
            raise InputError(f"{self.name} is asked about a phrase or a list of phrases, got {about!r:.80}")
        if not phrases or not all(each.strip() for each in phrases):
            raise InputError("there is no phrase, or an empty one; say what to find, such as 'striped star'")
        for phrase in phrases:
            for word in self._unknown_words(phrase):
                raise InputError(
                    f"this checkpoint never read the word {word!r}; the nearest that it did: "
                    f"{', '.join(self._near_words(word))}"
                )
            if len(_encoded(self.tokenizer, phrase)) > self.config.max_words:
                raise InputError(
                    f"{phrase!r:.80} has more than {self.config.max_words} words, which is the most that this "
                    "checkpoint reads; say it in fewer"
                )
        return list(phrases)

    def _near_words(self, word: str) -> list[str]:
        known = [token.strip(" \u2581") for token in self.tokenizer.tokens[self.tokenizer.first_piece :]]
        return get_close_matches(word.lower(), filter(str.isalpha, known), n=MAX_SHOWN, cutoff=0)

    # Showing and measuring

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Exam]:
        """Ask for phrases that are drawn from the annotations, every second one about nothing that is there.

        The last of those that name something are about what training left out, where the image has such.
        """
        from pix2seq.data.phrases import Scene

        scene = Scene.of(target, self._names)
        rng = np.random.default_rng((EXAM_SEED, target.image.id))
        asked = []
        for number in range(self.config.exam_phrases):
            absent = number % 2 == 1
            drawn = None
            if not absent and number >= self.config.exam_phrases / 2:
                drawn = self._maker.draw(scene, rng, absent=False, unseen=True)
            drawn = drawn or self._maker.draw(scene, rng, absent=absent)
            if drawn is not None:
                asked.append(Asked(drawn.text, target.boxes_xyxy[drawn.meant].astype(np.float64), drawn.is_unseen))
        return {"": Exam(tuple(asked))} if asked else {}

    def timed(self, target: Target) -> dict[str, Exam]:
        """Time the first phrase."""
        exams = self.questions(target, None)
        return {"ms_per_phrase": Exam(exams[""].asked[:1])} if exams else {}

    def metric(self, categories: Sequence[Category]) -> PhraseMetric:
        """See `Task`."""
        return PhraseMetric()

    def draw(self, canvas: Canvas, answers: Sequence[Instance]) -> None:
        """Draw boxes with their phrases."""
        canvas.instances(answers)

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """See `Task`; a description has the box that it is about, named by its words."""
        if not self._describes(example):
            return super().shown(example, size)
        category = Category(1, 1, self._words(example.targets[:-1]))
        return [instance_at(example.prompt[1 : 1 + BOX_TOKENS], category, Frame.of_input(size), self.vocab)]

    def summary(self, example: Example) -> str:
        """Return the phrase and whether it names the object, a description, or how many objects are listed."""
        if self._describes(example):
            return f"described as {self._words(example.targets[:-1])!r}"
        if example.choices is None:
            return super().summary(example)
        names = "no" if example.targets[0] == NOISE else "yes"
        return f"{self._words(example.prompt[2 : -1 - BOX_TOKENS])!r}: {names}"

    def _describes(self, example: Example) -> bool:
        return bool(example.prompt[-1] == SEPARATOR)

    def _words(self, ids: NDArray[np.int64]) -> str:
        return self.tokenizer.decode(ids - self.vocab.text_base)


def _order(answer: Instance | Found) -> float:
    return -answer.score if isinstance(answer, Instance) else 0.0


def _text(asked: str | Asked) -> str:
    return asked.text if isinstance(asked, Asked) else asked


@lru_cache(maxsize=2**14)
def _encoded(tokenizer: TextTokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text; splitting it into words takes longer than all else about a phrase."""
    return tuple(tokenizer.encode(text))
