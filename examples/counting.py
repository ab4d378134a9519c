"""A whole task in one file: how many objects of a class are in an image?

The prompt is the task's id and a class. The answer is one number n, written as coordinate bin n.
docs/adding-a-task.md walks through this file. Any package can bring a task like this: name it in the entry-point group
`pix2seq.tasks`, as examples/pyproject.toml does, or call `pix2seq.register_task(Counting)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pix2seq.drawing import Canvas
from pix2seq.errors import unknown_name
from pix2seq.examples import Example
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import Allowed
from pix2seq.settings import PositiveInt
from pix2seq.tasks.request import EncodedImage, Request
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.types import Category, Target
from pix2seq.vocab import CLASS_BASE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CountingConfig(TaskConfig):
    """How counting is trained and asked."""

    section = "counting"

    max_count: PositiveInt = 20  # larger numbers are answered as this one
    classes_per_image: PositiveInt = 4  # of an image in a training step, half of them absent where possible


@dataclass(frozen=True)
class Count:
    """How many objects of a class an image holds."""

    category: Category
    count: int
    score: float  # the probability of this number

    def to_json(self) -> dict[str, Any]:
        """Return the entry of NAME.json."""
        return {"category": self.category.name, "count": self.count, "score": round(self.score, 6)}


@dataclass(frozen=True)
class NumberGrammar:
    """One number: the ids from `first` to `last`."""

    first: int
    last: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`. Uses what tensors share with NumPy's arrays, which `pix2seq.runtime` computes with."""
        low = ids[:, :0].sum(1) + self.first  # (R,)
        return Allowed(low, low * 0 + self.last + 1, ids[:, :0])


class Counting(Task[CountingConfig]):
    """How many of this class are there?"""

    name = "counting"
    config_type = CountingConfig
    main_metric = "accuracy"
    length_setting = "nothing"  # three tokens always fit
    about_format = "class names, separated by commas"

    @property
    def max_seq_len(self) -> int:
        """Task, class, number."""
        return 3

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Ask about some classes that are there, and as many that are not."""
        labels = target.labels[~target.iscrowd]
        present = rng.permutation(np.unique(labels))
        absent = rng.permutation(np.setdiff1d(list(self.categories), labels))
        half = self.config.classes_per_image // 2
        chosen = [*present[: self.config.classes_per_image - min(half, len(absent))], *absent[:half]]
        return [self._example(int(label), int((labels == label).sum())) for label in chosen]

    def _example(self, label: int, count: int) -> Example:
        target = np.array([self.vocab.coord_base + min(count, self.config.max_count)], np.int64)
        return Example(self._prompt(label), target, target, np.ones(1, np.float32))

    def _prompt(self, label: int) -> np.ndarray:
        return np.append(self.prompt(), self.vocab.class_ids(np.array([label])))

    def requests(self, image: EncodedImage, about: Sequence[Category] | None) -> list[Request]:
        """Ask about each class given, or about all."""
        numbers = NumberGrammar(self.vocab.coord_base, self.vocab.coord_base + self.config.max_count)
        generation = GenerationConfig(1, temperature=0.0, grammar=numbers, eos_id=None)
        categories = self.categories.values() if about is None else about
        return [Request(self._prompt(category.label), generation, subject=category) for category in categories]

    def answers(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Count]:
        """Read one number for each class."""
        return [
            Count(
                request.subject,
                int(completion.tokens[0, 0]) - self.vocab.coord_base,
                float(np.exp(completion.logprobs[0, 0])),
            )
            for request, completion in zip(requests, completions, strict=True)
        ]

    def parse_about(self, text: str) -> list[Category]:
        """Read `star,ring`."""
        by_name = {category.name: category for category in self.categories.values()}
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in by_name:
                raise unknown_name("category", name, by_name)
        return [by_name[name] for name in names]

    def metric(self, categories: Sequence[Category]) -> CountMetric:
        """See `Task`."""
        return CountMetric(self.config.max_count)

    def draw(self, canvas: Canvas, answers: Sequence[Count]) -> None:
        """Write the numbers below the image."""
        canvas.text(", ".join(f"{answer.count} x {answer.category.name}" for answer in answers))

    def summary(self, example: Example) -> str:
        """Say the class and its number in a training sequence."""
        category = self.categories[int(example.prompt[1]) - CLASS_BASE]
        return f"{int(example.targets[0]) - self.vocab.coord_base} x {category.name}"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Count]:
        """Return what a training sequence says."""
        count, _, name = self.summary(example).partition(" x ")
        return [Count(category, int(count), 1.0) for category in self.categories.values() if category.name == name]


class CountMetric(Metric):
    """The share of right numbers, over all classes and over those that are there, and the mean error."""

    def __init__(self, max_count: int) -> None:
        self.max_count = max_count
        self.pairs: list[tuple[int, int]] = []  # the true number and the answered one

    def add(self, target: Target, answers: Sequence[Count]) -> None:
        """See `Metric`."""
        labels = target.labels[~target.iscrowd]
        for answer in answers:
            self.pairs.append((min(int((labels == answer.category.label).sum()), self.max_count), answer.count))

    def merge(self, other: CountMetric) -> None:
        """See `Metric`."""
        self.pairs += other.pairs

    def result(self) -> Scores:
        """See `Metric`."""
        true, said = np.array(self.pairs, np.int64).reshape(-1, 2).T
        there = true > 0
        return Scores(
            {
                "accuracy": float((true == said).mean()) if len(true) else None,
                "accuracy_present": float((true == said)[there].mean()) if there.any() else None,
                "mean_error": float(np.abs(true - said).mean()) if len(true) else None,
            }
        )
