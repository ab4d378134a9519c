"""What tasks about single objects share: the prompt is an object's box and class, the answer its mask or keypoints.

Scores follow google-research/pix2seq, `compute_weighted_scores`. Shapes: R rows, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pix2seq.data.targets import transform_target
from pix2seq.errors import InputError, unknown_name
from pix2seq.examples import Example
from pix2seq.geometry.affine import Affine
from pix2seq.geometry.boxes import box_xyxy_to_yxyx, padded_region
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.settings import Range, Share
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.instance import instance_prompts
from pix2seq.types import Category, Instance, Target, category_key
from pix2seq.vocab import CLASS_BASE, PAD, Vocab

if TYPE_CHECKING:
    from pix2seq.drawing import Canvas
    from pix2seq.metrics.calibration import TaskCalibration

Objects = Annotated[int, Range(least=1, most=10_000)]  # each takes memory in every sequence
Padding = Annotated[float, Range(least=0, most=100)]
TRUE_BOXES, FOUND_BOXES = "true_boxes", "found_boxes"  # what evaluation asks about


@dataclass(frozen=True)
class Boxes:
    """Boxes that a user asks about."""

    xyxy: ArrayLike  # (N, 4) in pixels of the image
    categories: str | Sequence[str] | None = None  # one name for all, or one for each; None: the model's only class
    scores: Sequence[float] | None = None  # None: 1 for each


def given_objects(boxes: Sequence[Instance] | ArrayLike, categories: str | Sequence[str] | None) -> Any:
    """Return what a user asks about in one image: instances, or `Boxes` made of numbers and class names.

    Raises `InputError` for a mix of instances and others.
    """
    given = [box for box in boxes if isinstance(box, Instance)] if isinstance(boxes, Sequence) else []
    if given and len(given) != len(boxes):  # type: ignore[arg-type]
        raise InputError(f"boxes mix {len(given)} instances with others; give instances or numbers")
    return given or Boxes(boxes, categories)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ObjectTaskConfig(TaskConfig):
    """Settings of a task about single objects."""

    max_objects: Objects = 10  # of one image in a training step, where nothing is cropped
    crop: bool = False  # every object is cropped around its box and encoded alone
    crop_padding: Padding = 0.25  # share of the box's size kept on each side of it, in crops and closeups
    closeup: bool = False  # every object gets a memory of its own from finer maps of the image, which is encoded once
    # In training, sides of the prompt's box move by up to this share of its size.
    box_jitter: Annotated[float, Range(least=0, below=0.5)] = 0.0
    min_box_score: Share = 0.05  # detected boxes below it are not asked about
    score_weight: Share = 0.0  # of the answer's likelihood in the score; the rest is the box's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop and self.closeup:
            raise ValueError(f"{self.section}.crop and closeup are two ways to look at an object; set one of them")


Config = TypeVar("Config", bound=ObjectTaskConfig)


class ObjectTask(Task[Config]):
    """Asks about one object at a time, and returns it with what was answered."""

    needs = ("detection",)
    main_metric = f"{TRUE_BOXES}/AP"
    graded_question = FOUND_BOXES
    scale_range = (0.3, 1.0)
    about_format = "objects as `x0,y0,x1,y1 CLASS`, in pixels, separated by semicolons"

    @abstractmethod
    def usable(self, target: Target, i: int) -> bool:
        """Whether object `i` of a target has what this task learns."""

    @abstractmethod
    def example(self, target: Target, i: int, size: tuple[int, int], rng: np.random.Generator) -> Example | None:
        """Return the training sequence of object `i`, None if nothing of it is left."""

    @abstractmethod
    def generation(self, category: Category) -> GenerationConfig:
        """Return how the sequence of an object of this class is generated."""

    @abstractmethod
    def answer(self, instance: Instance, completion: Completion, frame: Frame, size: tuple[int, int]) -> Instance:
        """Return the object with what was answered, in pixels of an image of `size` (width, height)."""

    def generation_of(self, example: Example) -> GenerationConfig:
        """See `Task`."""
        return self.generation(self.categories[int(example.prompt[-1]) - CLASS_BASE])

    @property
    def num_samples(self) -> int:
        """Answers to draw for each object."""
        return 1

    @property
    def crop_padding(self) -> float | None:
        """See `Task`."""
        return self.config.crop_padding if self.config.crop else None

    @property
    def looks_closer(self) -> bool:
        """See `Task`."""
        return self.config.closeup

    def accepts(self, category: Category) -> bool:
        """Whether objects of this class can be asked about."""
        return True

    def expected_tokens(self, instance: Instance, frame: Frame) -> int | None:
        """Estimate the length of an object's answer, to batch answers of like length; None: no estimate."""
        return None

    def samples(self, target: Target) -> list[int | None]:
        """See `Task`."""
        found = [i for i in range(len(target.labels)) if self.usable(target, i)]
        return [*found] if self.crop_padding is not None else [None] if found else []

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return a sequence for each of up to `max_objects` objects, drawn at random."""
        found: list[Example] = []
        for i in rng.permutation([i for i in range(len(target.labels)) if self.usable(target, i)]):
            if len(found) == self.config.max_objects:
                break
            example = self._example(target, int(i), size, rng)
            if example is not None:
                found.append(example)
        return found

    def _example(self, target: Target, i: int, size: tuple[int, int], rng: np.random.Generator) -> Example | None:
        """Return the sequence of object `i` as prompted and framed in training."""
        box = target.boxes_xyxy[i]
        if self.config.box_jitter:
            box = jitter_box(box, self.config.box_jitter, size, rng)
            is_asked = np.arange(len(target.labels))[:, None] == i
            target = replace(target, boxes_xyxy=np.where(is_asked, box, target.boxes_xyxy))
        if not self.config.closeup:
            example = self.example(target, i, size, rng)
            return example and replace(example, target=target.only(i))
        whole = Frame(np.zeros(2), np.array(size[::-1], np.float64))
        frame = whole.around(box, self.config.crop_padding)
        scale = float(size[1] / frame.size[0])  # the same on both axes: a frame has the aspect ratio of the input
        near = transform_target(target.only(i), Affine(scale, scale, *(-scale * frame.origin).tolist()), size)
        example = self.example(near, 0, size, rng)
        closeup = whole.to_input_yxyx(frame.xyxy[None])[0].astype(np.float32)
        return example and replace(example, closeup=closeup, target=near)

    def object_prompt(self, target: Target, i: int, size: tuple[int, int]) -> NDArray[np.int64]:
        """Return the prompt (6,) about object `i` of a target in pixels of an input of `size` (height, width)."""
        box = (box_xyxy_to_yxyx(target.boxes_xyxy[i : i + 1]) / np.array([*size, *size])).astype(np.float32)
        return instance_prompts(self.name, box, target.labels[i : i + 1], self.vocab)[0]

    def requests(self, image: EncodedImage, about: Sequence[Instance]) -> list[Request]:
        """Return a request for each object, on its crop if objects are cropped. Needs a class that `accepts`."""
        usable = [instance for instance in about if self.accepts(instance.category)]
        if about and not usable:
            raise InputError(f"the class {about[0].category.name!r} has no {self.name}s; ask about one that has")
        return [self._request(image, instance) for instance in usable]

    def _request(self, image: EncodedImage, instance: Instance) -> Request:
        instance = replace(instance, score=instance.uncalibrated)  # what the answer's score is made from
        box = np.array(instance.box_xyxy, np.float64)
        region = None if self.crop_padding is None else padded_region(box, *image.size, self.crop_padding)
        closeup = image.frame().around(box, self.config.crop_padding) if self.config.closeup else None
        frame = closeup or image.frame(region)
        labels = np.array([instance.category.label], np.int64)
        return Request(
            instance_prompts(self.name, frame.to_input_yxyx(box[None]), labels, self.vocab)[0],
            self.generation(instance.category),
            subject=instance,
            region=region,
            closeup=closeup,
            num_samples=self.num_samples,
            expected_tokens=self.expected_tokens(instance, frame),
        )

    def answers(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Instance]:
        """Return the objects with their answers, best score first."""
        found = [
            self.answer(request.subject, completion, request.frame(image), image.size)
            for request, completion in zip(requests, completions, strict=True)
        ]
        return sorted(found, key=lambda instance: -instance.score)

    def calibrated(self, answers: Sequence[Instance], calibration: TaskCalibration | None) -> list[Instance]:
        """Turn scores into the probability that box, class and answer are right.

        This needs a box that a calibrated detector found; the score of a given box says nothing about the box.
        """
        if calibration is None:
            return [replace(answer, raw_score=None) for answer in answers]
        found = calibrated_instances([answer for answer in answers if answer.raw_score is not None], calibration)
        given = [answer for answer in answers if answer.raw_score is None]
        return sorted([*found, *given], key=lambda instance: -instance.score)

    def parts(self, image: EncodedImage, request: Request, completion: Completion) -> list[tuple[int, int, Instance]]:
        """See `Task`: all tokens are about the object of the prompt."""
        return [(0, completion.tokens.shape[1], request.subject)]

    def parse_about(self, text: str) -> Boxes:
        """Read `x0,y0,x1,y1 CLASS; ...`."""
        boxes, names = [], []
        try:
            for part in filter(None, map(str.strip, text.split(";"))):
                corners, _, name = part.partition(" ")
                boxes.append([float(corner) for corner in corners.split(",")])
                names.append(name.strip())
        except ValueError:
            raise InputError(f"--about {text!r} cannot be read; expected {self.about_format}") from None
        return Boxes(boxes, names if any(names) else None)

    def check_about(self, image: EncodedImage, about: Boxes | Sequence[Instance]) -> list[Instance]:
        """Bring `Boxes`, or instances of any model, to instances of this model's classes, clipped to the image."""
        if isinstance(about, Boxes):
            return self._instances(image.size, about)
        if not isinstance(about, Sequence) or not all(isinstance(each, Instance) for each in about):
            raise InputError(f"{self.name} is asked about Boxes or a list of instances, got {type(about).__name__}")
        boxes = Boxes(
            [each.box_xyxy for each in about],
            [each.category.name for each in about],
            [each.score for each in about],
        )
        checked = self._instances(image.size, boxes)
        return [
            replace(each, box_xyxy=known.box_xyxy, category=known.category)
            for each, known in zip(about, checked, strict=True)
        ]

    def _instances(self, size: tuple[int, int], boxes: Boxes) -> list[Instance]:
        try:
            corners = np.asarray(boxes.xyxy, np.float64)
            scores = np.ones(len(corners)) if boxes.scores is None else np.asarray(boxes.scores, np.float64)
        except (ValueError, TypeError, OverflowError, RuntimeError):  # ragged, no numbers, a tensor on a GPU
            raise InputError("boxes must be numbers (N, 4) as x0, y0, x1, y1, and their scores numbers (N,)") from None
        if not corners.size:
            return []
        if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
            raise InputError(f"boxes must be finite numbers (N, 4) as x0, y0, x1, y1, got shape {corners.shape}")
        corners = np.clip(corners, 0, np.tile(size, 2))
        if not (corners[:, 2:] > corners[:, :2]).all():
            raise InputError("boxes must have x1 > x0 and y1 > y0, in pixels and inside the image")
        if scores.shape != (len(corners),) or not ((scores >= 0) & (scores <= 1)).all():
            raise InputError(f"{len(corners)} boxes need as many scores from 0 to 1, got {boxes.scores}")
        if boxes.categories is None and len(self.categories) > 1:
            raise InputError("boxes need categories: one name for all of them, or one for each")
        names = next(iter(self.categories.values())).name if boxes.categories is None else boxes.categories
        listed = [names] * len(corners) if isinstance(names, str) else names
        if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
            raise InputError(f"categories must be a name for all boxes, or a list with one for each, got {names!r}")
        if len(listed) != len(corners):
            raise InputError(f"{len(corners)} boxes were given with {len(listed)} categories; give one for each")
        return [
            Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), self._category(name), float(score))
            for b, name, score in zip(corners, listed, scores, strict=True)
        ]

    def _category(self, name: str) -> Category:
        for category in self.categories.values():
            if category_key(category.name) == category_key(name):
                return category
        raise unknown_name("category", name, [category.name for category in self.categories.values()])

    def subjects(self, found: Sequence[Instance]) -> list[Instance]:
        """Drop detections below `min_box_score`, and those of classes that cannot be asked about."""
        least = self.config.min_box_score
        return [instance for instance in found if instance.uncalibrated >= least and self.accepts(instance.category)]

    def merge(self, found: Sequence[Instance], answers: Sequence[Instance]) -> list[Instance]:
        """Put masks or keypoints onto the objects of the same box and class, which keep their own scores."""
        by_object = {(answer.box_xyxy, answer.category): answer for answer in answers}
        return [
            replace(
                by_object.get((instance.box_xyxy, instance.category), instance),
                score=instance.score,
                raw_score=instance.raw_score,
            )
            for instance in found
        ]

    def questions(self, target: Target, found: Sequence[Instance] | None) -> dict[str, list[Instance]]:
        """Ask about annotated boxes, and, apart from that, about detected ones."""
        true = [
            Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), self.categories[int(label)], 1.0)
            for b, label, crowd in zip(target.boxes_xyxy, target.labels, target.iscrowd, strict=True)
            if not crowd and self.accepts(self.categories[int(label)])
        ]
        return {TRUE_BOXES: true} | ({} if found is None else {FOUND_BOXES: self.subjects(found)})

    def draw(self, canvas: Canvas, answers: Sequence[Instance]) -> None:
        """See `Task`."""
        canvas.instances(answers)

    def to_json(self, answers: Sequence[Instance]) -> dict[str, Any]:
        """See `Task`."""
        return {"instances": [instance.to_json() for instance in answers]}

    def summary(self, example: Example) -> str:
        """Name the class that the sequence is about."""
        return f"class {self.categories[int(example.prompt[-1]) - CLASS_BASE].name}"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """See `Task`."""
        frame = Frame.of_input(size, example.closeup)
        instance = instance_at(
            example.prompt[1:5], self.categories[int(example.prompt[5]) - CLASS_BASE], frame, self.vocab
        )
        tokens, ones = example.targets[None], np.zeros((1, len(example.targets)), np.float32)
        completion = Completion(tokens, ones, tokens, ones, np.zeros(1, np.bool_))
        return [replace(self.answer(instance, completion, frame, size[::-1]), score=1.0)]


def calibrated_instances(instances: Sequence[Instance], calibration: TaskCalibration) -> list[Instance]:
    """Return objects with the probability that they are right as their score, best first."""
    found = [
        replace(each, score=calibration.probability(each.score, each.category.name), raw_score=each.score)
        for each in instances
    ]
    return sorted(found, key=lambda instance: -instance.score)


def instance_at(coord_ids: NDArray[np.integer], category: Category, frame: Frame, vocab: Vocab) -> Instance:
    """Return an object at the box that four ids `y0, x0, y1, x1` say, in pixels of the image."""
    (x0, y0), (x1, y1) = frame.to_image_xy(vocab.coords(coord_ids).reshape(2, 2)).tolist()
    return Instance((x0, y0, x1, y1), category, 1.0)


def jitter_box(
    box_xyxy: NDArray[np.floating], share: float, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Move each side of a box by up to `share` of its width or height, within an input of `size` (height, width)."""
    moves = rng.uniform(-share, share, 4) * np.tile(box_xyxy[2:] - box_xyxy[:2], 2)
    return np.clip(box_xyxy + moves, 0, [*size[::-1], *size[::-1]]).astype(np.float32)


def token_score(tokens: ArrayLike, logprobs: ArrayLike) -> NDArray[np.float64]:
    """Return the mean likelihood (R,) of the tokens (R, T) that are no padding; 0 for a row without any."""
    counted = np.asarray(tokens) != PAD
    likelihoods = np.exp(np.asarray(logprobs, np.float64)) * counted
    return likelihoods.sum(axis=1) / np.maximum(counted.sum(axis=1), 1)


def weighted_score(box_score: float, likelihood: float, weight: float) -> float:
    """Weigh the likelihood of an object's sequence with `weight`, its box's score with the rest."""
    return weight * likelihood + (1 - weight) * box_score
