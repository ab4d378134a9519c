"""The task by words: a phrase is answered by the boxes of all objects that it names, none if there are none.

The prompt gives the phrase a slot, an id without a meaning of its own that is drawn anew for each training sequence.
So the model cannot learn what a slot is; it must read the phrase. Noise objects, among them the other objects of the
image, teach how likely it is that a box is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import MAX_SHOWN, InputError
from pix2seq.examples import Example
from pix2seq.geometry.boxes import box_xyxy_to_yxyx
from pix2seq.metrics.phrases import Asked, Found, PhraseMetric
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar
from pix2seq.settings import NonNegativeFloat, PositiveInt, PositiveShare, Range, Share, ShareBelowOne
from pix2seq.tasks.objects import Objects, calibrated_instances, instance_at
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.by_words import EXTRA_TOKENS, decode_named, encode_named, phrase_prompt
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT, add_noise_objects
from pix2seq.tokenizers.text import UNKNOWN, TextTokenizer, WordTokenizer
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import NOISE, SLOTS

if TYPE_CHECKING:
    from pix2seq.data.phrases import PhraseMaker
    from pix2seq.drawing import Canvas
    from pix2seq.metrics.calibration import TaskCalibration

EXAM_SEED = 16  # of the phrases that evaluation asks for, with the image's id


@dataclass(frozen=True)
class ByWordsConfig(TaskConfig):
    """How finding objects by words is trained and asked."""

    section = "by_words"

    phrases: Annotated[int, Range(least=1, most=1000)] = 4  # of an image in a training step
    absent_share: Share = 0.5  # of them that name nothing in the image
    unseen_share: ShareBelowOne = 0.0  # of the combinations of class, colour and texture that training leaves out
    max_objects: Objects = 20  # in a training sequence, noise included, which fills it up
    max_words: Annotated[int, Range(least=1, most=10_000)] = 24  # text tokens of a phrase
    noise_weight: NonNegativeFloat = 1.0  # loss weight of the noise class
    num_objects: Objects | None = None  # boxes to ask for; none given: max_objects
    min_score: Share = 0.5  # least probability of being named of a box that is an answer
    exam_phrases: PositiveInt = 6  # that evaluation asks of an image
    top_p: PositiveShare = 0.4


@dataclass(frozen=True)
class Exam:
    """What evaluation asks about an image."""

    asked: tuple[Asked, ...]


class ByWords(Task[ByWordsConfig]):
    """Which objects are meant?"""

    name = "by_words"
    config_type = ByWordsConfig
    main_metric = "AP50"
    hub_pipeline = "zero-shot-object-detection"
    length_setting = "by_words.max_objects"
    uses_classes = False
    reads_text = True
    takes_words = True
    about_format = "phrases, separated by semicolons: `striped star; people in blue`"

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model's text."""
        if self.text is None:
            raise ValueError("by_words needs a text tokenizer")
        return self.text

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
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        objects = max(self.config.max_objects, self.config.num_objects or 0)
        return EXTRA_TOKENS + self.config.max_words + TOKENS_PER_OBJECT * objects

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
        """Return a sequence for each of `phrases` phrases, drawn at random."""
        from pix2seq.data.phrases import Scene

        scene = Scene.of(target, self._names, size)
        boxes = (box_xyxy_to_yxyx(target.boxes_xyxy) / np.array([*size, *size])).astype(np.float32)
        found = []
        for _ in range(self.config.phrases):
            drawn = self._maker.draw(scene, rng, absent=bool(rng.random() < self.config.absent_share))
            if drawn is not None:
                found.append(self._example(drawn.text, drawn.meant, boxes, ~target.iscrowd, rng))
        return found

    def _example(
        self,
        text: str,
        meant: Sequence[int],
        boxes_yxyx: NDArray[np.float32],
        usable: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Example:
        room = self.config.max_objects
        is_meant = np.isin(np.arange(len(boxes_yxyx)), meant)
        real = boxes_yxyx[rng.permutation(np.flatnonzero(is_meant))[:room]]
        others = boxes_yxyx[rng.permutation(np.flatnonzero(~is_meant & usable))[: room - len(real)]]
        invented = room - len(real) - len(others)
        made, _ = add_noise_objects(real, np.ones(len(real), np.int64), invented, rng)
        noise = rng.permutation(np.concatenate([others, made[len(real) :]]))
        slot = int(rng.choice(SLOTS))
        response = encode_named(
            np.concatenate([real, noise]),
            np.arange(room) < len(real),
            slot,
            self.vocab,
            rng,
            noise_weight=self.config.noise_weight,
        )
        return Example(self._prompt(text, slot), response.inputs, response.targets, response.weights)

    def _prompt(self, text: str, slot: int) -> NDArray[np.int64]:
        return phrase_prompt(self.vocab.task_id(self.name), slot, _encoded(self.tokenizer, text), self.vocab)

    # Asking and answering

    def generation(self, slot: int) -> GenerationConfig:
        """Return how a list of boxes is generated, with the probability of the slot wherever a class comes next."""
        grammar = BoxGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            class_base=slot - 1,
            max_label=1,
            noise_id=NOISE,
            eos_id=None,
        )
        return GenerationConfig(
            TOKENS_PER_OBJECT * (self.config.num_objects or self.config.max_objects),
            grammar=grammar,
            eos_id=None,
            score_range=(slot, slot + 1),
            score_steps=(TOKENS_PER_OBJECT, TOKENS_PER_OBJECT - 1),
            with_logprobs=False,
            **self.sampling,
        )

    def requests(self, image: EncodedImage, about: Sequence[str] | Exam | None) -> list[Request]:
        """Return a request for each phrase, with a slot of its own. Raises `InputError` if there is none."""
        if about is None:
            raise InputError(f"{self.name} is asked about phrases; give some with --find, or Predictor.find")
        is_exam = isinstance(about, Exam)
        asked = about.asked if isinstance(about, Exam) else [Asked(text) for text in about]
        slots = [SLOTS[i % len(SLOTS)] for i in range(len(asked))]
        return [
            Request(self._prompt(each.text, slot), self.generation(slot), subject=(number, each, is_exam))
            for number, (each, slot) in enumerate(zip(asked, slots, strict=True), start=1)
        ]

    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Return the objects of at least `min_score`, best first, their class named by the phrase; of an exam all."""
        found: list[Any] = []
        for request, completion in zip(requests, completions, strict=True):
            number, asked, is_exam = request.subject
            boxes, scores = self._boxes(completion, request.frame(image), image.size)
            if is_exam:
                found.append(Found(asked, boxes, scores, self.config.min_score))
                continue
            category = Category(number, number, asked.text)
            found += [
                Instance((b[0], b[1], b[2], b[3]), category, score)
                for b, score in zip(boxes.tolist(), scores.tolist(), strict=True)
                if score >= self.config.min_score
            ]
        return found if any(request.subject[2] for request in requests) else sorted(found, key=lambda each: -each.score)

    def _boxes(
        self, completion: Completion, frame: Frame, size: tuple[int, int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return boxes (N, 4) in pixels of an image of `size` (width, height), best first, and their scores (N,)."""
        assert completion.best_logprobs is not None
        boxes_yxyx, scores = decode_named(completion.tokens[0], completion.best_logprobs[0], self.vocab)
        corners = np.clip(frame.to_image_xy(boxes_yxyx.reshape(-1, 2, 2)).reshape(-1, 4), 0, np.tile(size, 2))
        order = np.argsort(-scores, kind="stable")
        order = order[(corners[order, 2:] > corners[order, :2]).all(axis=1)]
        return corners[order], scores[order]

    def calibrated(self, answers: Sequence[Any], calibration: TaskCalibration | None) -> list[Any]:
        """See `Task`."""
        return list(answers) if calibration is None else calibrated_instances(answers, calibration)

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

    def summary(self, example: Example) -> str:
        """Return the phrase, and how many objects it names."""
        words = example.prompt[2:-1] - self.vocab.text_base
        count = int((example.targets[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT] != NOISE).sum())
        return f"{self.tokenizer.decode(words)!r}: {count} objects"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """Return the named objects."""
        category = Category(1, 1, self.tokenizer.decode(example.prompt[2:-1] - self.vocab.text_base))
        groups = example.targets.reshape(-1, TOKENS_PER_OBJECT)
        return [
            instance_at(group[:4], category, Frame.of_input(size), self.vocab) for group in groups if group[-1] != NOISE
        ]


@lru_cache(maxsize=2**14)
def _encoded(tokenizer: TextTokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text; splitting it into words takes longer than all else about a phrase."""
    return tuple(tokenizer.encode(text))
