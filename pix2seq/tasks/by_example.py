"""The task by example: an object shown in one image, and all objects like it are found in another.

An object is compared with examples by closeups of all of them, whose memories are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.examples import Example, OtherView
from pix2seq.geometry.polygons import MIN_POINTS, clip_rings
from pix2seq.metrics.presence import Found, PresenceMetric
from pix2seq.settings import Range, Share
from pix2seq.tasks.outlines import Ring, bounds, visible_rings
from pix2seq.tasks.request import EncodedImage, Reference
from pix2seq.tasks.shown import Shown, given_examples
from pix2seq.tasks.slots import MIN_OBJECT, Meaning, SlotConfig, SlotTask, View
from pix2seq.tokenizers.by_example import example_prompt, prompt_length
from pix2seq.tokenizers.slots import KINDS, NO_SLOT
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import NOISE

if TYPE_CHECKING:
    from pix2seq.data.companions import Companion, ObjectsByClass
    from pix2seq.drawing import Canvas

MAX_IMAGES = 16  # of examples, encoded side by side
ASKED_NAMES = 4  # at most, in evaluation; half of them of objects that are there


@dataclass(frozen=True)
class ByExampleConfig(SlotConfig):
    """How examples are trained and asked."""

    section = "by_example"

    # In a prompt, of all slots. In training so many other images are shown beside each one.
    max_examples: Annotated[int, Range(least=1, most=64)] = 4
    max_slots: Annotated[int, Range(least=1, most=len(KINDS))] = 2  # kinds of objects asked for at once, in training
    prompts: Annotated[int, Range(least=1, most=100)] = 4  # of an image in training, each with some of the examples
    # In training, how often
    present_share: Share = 0.75  # the image has what an example shows
    same_share: Share = 0.25  # a further image shows what an earlier one does
    more_share: Share = 0.3  # a further example is in the prompt
    polygon_share: Share = 0.0  # an example is shown with its outline; 0: the model reads boxes alone
    short_points: Annotated[int, Range(least=MIN_POINTS, most=10_000)] = 12  # of an example's outline


@dataclass(frozen=True)
class Examples:
    """What users ask by: objects of other images, or of the same."""

    shown: tuple[Shown, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the slots are called, in their order."""
        return tuple(dict.fromkeys(each.name for each in self.shown))


@dataclass(frozen=True)
class Kind:
    """A kind of object that evaluation asks for."""

    label: int  # of the class, which the model is not told
    shown: Shown
    is_unseen: bool = False  # training left the class out


@dataclass(frozen=True)
class Exam:
    """What evaluation asks about one image."""

    asked: tuple[Kind, ...]


@dataclass(frozen=True)
class _Lesson:
    """An example of a training sequence."""

    label: int
    view: OtherView
    box_yxyx: NDArray[np.floating]  # of what the view shows
    outline: tuple[Ring, ...]  # `yx` of it too; () for a box alone


class ByExample(SlotTask[ByExampleConfig]):
    """Where are more of these?"""

    name = "by_example"
    config_type = ByExampleConfig
    main_metric = "AP50"
    length_setting = "by_example.max_objects (or max_examples)"
    takes_examples = True
    shows_companions = True
    about_format = (
        "examples as `IMAGE:x0,y0,x1,y1`, a file and a box in its pixels, or the points x,y,x,y,... of a polygon, "
        "separated by semicolons"
    )

    @property
    def max_prompt(self) -> int:
        """See `SlotTask`."""
        return prompt_length(self.config.max_examples, self.config.short_points if self.reads_polygons else 0)

    @property
    def reads_polygons(self) -> bool:
        """Whether it learned to read outlines of examples; if not, it reads their boxes."""
        return self.config.polygon_share > 0

    @property
    def reads_masks(self) -> bool:
        """See `Task`."""
        return super().reads_masks or self.reads_polygons

    @property
    def sees_whole(self) -> bool:
        """See `SlotTask`: an object is like another wherever it is."""
        return False

    @property
    def num_references(self) -> int:
        """See `Task`."""
        return self.config.max_examples

    # Learning

    def companions(
        self, target: Target, objects: ObjectsByClass, rng: np.random.Generator, *, scoring: bool = False
    ) -> list[Companion]:
        """Draw examples of classes that the image has and of classes that it lacks."""
        here = np.unique(target.labels[~target.iscrowd])
        elsewhere = np.setdiff1d(objects.labels, target.labels)
        if scoring:
            labels = [*rng.permutation(here)[: ASKED_NAMES // 2], *rng.permutation(elsewhere)[: ASKED_NAMES // 2]]
        else:
            labels = []
            for _ in range(self.config.max_examples):
                pool = here if rng.random() < self.config.present_share else elsewhere
                if labels and rng.random() < self.config.same_share:
                    pool = np.array(labels)
                labels += rng.choice(pool, min(len(pool), 1)).tolist()
        drawn = (objects.draw(int(label), rng, but_image_id=target.image.id) for label in labels)
        return [each for each in drawn if each is not None]

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return the list of the image, and comparisons with some of the target's companions as examples."""
        shown = [
            self._lesson(companion, number, size, rng)
            for number, companion in enumerate(target.companions)
            if len(companion.labels)
        ]
        objects = self.objects(target, size, rng)
        found = [self.learned_list(target, size, rng), *self.learned_outlines(target, objects, size, rng)]
        for _ in range(self.config.prompts if shown else 0):
            found += self._comparisons(self._some(shown, rng), target, objects, rng)
        return found

    def _some(self, shown: Sequence[_Lesson], rng: np.random.Generator) -> list[_Lesson]:
        """Draw the examples of a prompt."""
        some: list[_Lesson] = []
        for i in rng.permutation(len(shown)).tolist():
            if some and rng.random() >= self.config.more_share:
                break
            labels = {lesson.label for lesson in (*some, shown[i])}
            if len(labels) <= self.config.max_slots:
                some.append(shown[i])
        return some

    def _comparisons(
        self, lessons: Sequence[_Lesson], target: Target, objects: Mapping[int, View], rng: np.random.Generator
    ) -> list[Example]:
        """Return the comparisons of some objects with a prompt of these examples."""
        labels = list(dict.fromkeys(lesson.label for lesson in lessons))
        first = int(rng.integers(len(KINDS) - len(labels) + 1))
        asked = range(first, first + len(labels))
        slot_of = dict(zip(labels, rng.permutation(asked).tolist(), strict=True))
        prompt = example_prompt(
            self.vocab.task_id(self.name),
            np.array([slot_of[lesson.label] for lesson in lessons]),
            np.stack([lesson.box_yxyx for lesson in lessons]),
            self.vocab,
            outlines=[lesson.outline for lesson in lessons],
            short_points=self.config.short_points,
        )
        slots = np.array([slot_of.get(label, NO_SLOT) for label in target.labels.tolist()], np.int64)
        others = tuple(lesson.view for lesson in lessons)
        return self.learned_comparisons(prompt, slots, asked, objects, rng, others)

    def _lesson(self, companion: Target, number: int, size: tuple[int, int], rng: np.random.Generator) -> _Lesson:
        view = self.view(companion, 0, size, rng)
        outline: tuple[Ring, ...] = ()
        if self.reads_polygons and companion.segmentations[0] and rng.random() < self.config.polygon_share:
            outline = tuple(view.frame.to_input_yx(ring) for ring in visible_rings(companion, 0, size))
        return _Lesson(int(companion.labels[0]), replace(view.views[0], companion=number), view.box_yxyx, outline)

    def summary(self, example: Example) -> str:
        """Count the examples and say whether the object is like one."""
        if example.choices is None:
            return super().summary(example)
        return f"{len(example.others)} examples: {'no' if example.targets[0] == NOISE else 'yes'}"

    # Asking and answering

    def meanings(self, image: EncodedImage, about: Examples | Exam | None) -> list[Meaning]:
        """Return one meaning for all examples of a user, and one for each kind of an exam."""
        if about is None:
            raise InputError(
                f"{self.name} is asked by examples; give one as (image, box or polygon), or --like IMAGE:x0,y0,x1,y1"
            )
        if isinstance(about, Exam):
            return [self._meaning(Examples((kind.shown,)), subject=kind) for kind in about.asked]
        return [self._meaning(about, subject=None)]

    def _meaning(self, examples: Examples, subject: Kind | None) -> Meaning:
        slots = {name: number for number, name in enumerate(examples.names)}
        references, boxes, outlines = [], [], []
        for shown in examples.shown:
            box = np.array(shown.box_xyxy, np.float64)
            closeup = self.closeup_of(shown.image, box)
            references.append(Reference(shown.image, closeup))
            frame = closeup or shown.image.frame()
            boxes.append(frame.to_input_yxyx(box[None])[0])
            outlines.append([frame.to_input_yx(ring) for ring in shown.polygons] if self.reads_polygons else [])
        prompt = example_prompt(
            self.vocab.task_id(self.name),
            np.array([slots[shown.name] for shown in examples.shown]),
            np.stack(boxes),
            self.vocab,
            outlines=outlines,
            short_points=self.config.short_points,
        )
        outlined_from = self.config.min_score if subject is None else MIN_OBJECT
        return Meaning(prompt, examples.names, subject, tuple(references), outlined_from)

    def told(self, meaning: Meaning, found: list[Instance]) -> list[Any]:
        """Return the objects of at least `min_score`; of an exam, all that was `Found` of a kind."""
        kind = meaning.subject
        if kind is not None:
            return [Found(kind.label, tuple(found), kind.is_unseen)]
        return [each for each in found if each.score >= self.config.min_score]

    def parse_about(self, text: str) -> Examples:
        """Read `IMAGE:x0,y0,x1,y1; IMAGE:x,y,x,y,x,y; ...`."""
        shown: list[Shown] = []
        for part in filter(None, map(str.strip, text.split(";"))):
            path, _, numbers = part.rpartition(":")
            try:
                values = [float(number) for number in numbers.split(",")]
            except ValueError:
                values = []
            if not path or len(values) % 2 or len(values) < 4:
                raise InputError(f"example {part!r} cannot be read; expected {self.about_format}")
            shown += given_examples((path, values))
        if not shown:
            raise InputError(f"no example was given; expected {self.about_format}")
        return Examples(tuple(shown))

    def encoded(
        self, abouts: Sequence[Any], encode: Callable[[Sequence[Any]], list[EncodedImage]]
    ) -> list[Examples | Exam]:
        """Encode the images of examples, each once."""
        checked = [self._checked(about) for about in abouts]
        images = [shown.image for about in checked for shown in _shown(about)]
        distinct = {_image_key(image): image for image in images}
        keys = list(distinct)
        known: dict[Any, EncodedImage] = {}
        for start in range(0, len(keys), MAX_IMAGES):
            some = keys[start : start + MAX_IMAGES]
            known |= zip(some, encode([distinct[key] for key in some]), strict=True)
        return [_map(about, lambda shown: replace(shown, image=known[_image_key(shown.image)])) for about in checked]

    def _checked(self, about: Any) -> Examples | Exam:
        if isinstance(about, Examples | Exam):
            return about
        if isinstance(about, tuple) and about and all(isinstance(each, Shown) for each in about):
            return Examples(about)
        raise InputError(f"{self.name} is asked by examples, see Predictor.find; got {type(about).__name__}")

    def check_about(self, image: EncodedImage, about: Any) -> Examples | Exam:
        """Check examples against their images. Raises `InputError` for those without area, and for too many."""
        about = self._checked(about)
        if isinstance(about, Examples) and len(about.shown) > self.config.max_examples:
            raise InputError(
                f"{len(about.shown)} examples were given, but the model reads at most {self.config.max_examples}"
            )
        if isinstance(about, Examples) and len(about.names) > len(KINDS):
            raise InputError(f"{len(about.names)} kinds of objects were given, but the model has {len(KINDS)} slots")
        return _map(about, _inside)

    # Showing and measuring

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Exam]:
        """Ask for the classes of the companions, by these as examples: by their boxes, then by outlines if it can."""
        by_box, by_polygon = [], []
        for companion in target.companions:
            x0, y0, x1, y1 = companion.boxes_xyxy[0].tolist()
            shown, label = Shown(companion.image.path, (x0, y0, x1, y1)), int(companion.labels[0])
            is_unseen = bool(companion.attributes) and companion.attributes[0].get("seen") == "no"
            by_box.append(Kind(label, shown, is_unseen))
            if self.reads_polygons and companion.segmentations[0]:
                rings = visible_rings(companion, 0, (companion.image.height, companion.image.width))
                by_polygon.append(Kind(label, replace(shown, polygons=tuple(rings)), is_unseen))
        return {"": Exam(tuple(by_box)), **({"polygons": Exam(tuple(by_polygon))} if by_polygon else {})}

    def metric(self, categories: Sequence[Category]) -> PresenceMetric:
        """See `Task`."""
        return PresenceMetric(categories, self.config.min_score, with_masks=self.config.outlines)

    def draw(self, canvas: Canvas, answers: Sequence[Instance | Found]) -> None:
        """Draw boxes with the names of what they are like, also those of an exam."""
        for answer in answers:
            canvas.instances(answer.instances if isinstance(answer, Found) else [answer])


def _shown(about: Examples | Exam) -> list[Shown]:
    return list(about.shown) if isinstance(about, Examples) else [kind.shown for kind in about.asked]


def _map(about: Examples | Exam, change: Callable[[Shown], Shown]) -> Examples | Exam:
    if isinstance(about, Examples):
        return Examples(tuple(map(change, about.shown)))
    return Exam(tuple(replace(kind, shown=change(kind.shown)) for kind in about.asked))


def _image_key(image: Any) -> Any:
    """Tell images apart: files by their paths, others by identity."""
    return str(image) if isinstance(image, str | Path) else id(image)


def _inside(shown: Shown) -> Shown:
    """Return an example clipped to its image, with the box around what is left of its polygons, if it has any."""
    width, height = shown.image.size
    rings = tuple(clip_rings(shown.polygons, width, height))
    if shown.polygons and not rings:
        raise InputError(f"the polygon of an example has no area inside its image of {width} x {height} pixels")
    box = bounds(rings) if rings else np.clip(shown.box_xyxy, 0, np.tile(shown.image.size, 2))
    x0, y0, x1, y1 = box.tolist()
    if not (x1 > x0 and y1 > y0):
        raise InputError(
            f"the box of an example needs x1 > x0 and y1 > y0, inside its image of {width} x {height} pixels; got "
            f"{shown.box_xyxy}"
        )
    return replace(shown, box_xyxy=(x0, y0, x1, y1), polygons=rings)
