"""What every task is: sequences to learn from, and a way to ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.geometry.boxes import box_xyxy_to_yxyx
from pix2seq.model.decoding.generate import GenerationConfig
from pix2seq.tokenizers.instance import instance_prompts
from pix2seq.tokenizers.text import TextTokenizer
from pix2seq.types import Category, Target
from pix2seq.vocab import Vocab

if TYPE_CHECKING:
    from pix2seq.model.pix2seq import Pix2Seq

TaskName = Literal["detection", "segmentation", "keypoint", "captioning"]


@dataclass(frozen=True)
class TaskConfig:
    """Settings that all tasks have."""

    loss_weight: float = 1.0  # of this task's loss in the sum of all
    batch_size: int | None = None  # images of this task a step; none given: the run's batch_size
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"a task's batch_size must be at least 1, got {self.batch_size}")
        if self.loss_weight < 0:
            raise ValueError(f"a task's loss_weight must not be negative, got {self.loss_weight}")
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.temperature < 0:
            raise ValueError("a task needs temperature >= 0, top_k >= 0 and top_p in (0, 1]")


Config = TypeVar("Config", bound=TaskConfig)


class Task(ABC, Generic[Config]):
    """Joins a tokenizer with prompts, a grammar and the results people see."""

    name: ClassVar[TaskName]
    config_type: ClassVar[type[TaskConfig]]
    scale_range: ClassVar[tuple[float, float]]  # of the resizing jitter in training, as published
    learns_from: ClassVar[str]  # what an image must have, in a word
    length_setting: ClassVar[str]  # what to lower where sequences are too long

    def __init__(
        self,
        config: Config,
        vocab: Vocab,
        categories: Sequence[Category],
        text: TextTokenizer | None = None,
    ) -> None:
        self.config = config
        self.vocab = vocab
        self.categories = {category.label: category for category in categories or numbered_categories(vocab)}
        self.max_label = max(self.categories)
        if self.max_label > vocab.max_label:
            raise InputError(
                f"{len(self.categories)} classes need ids up to {self.max_label}, but the vocabulary holds labels 1 "
                f"to {vocab.max_label}; raise model.vocab.coord_base"
            )
        self.text = text

    @classmethod
    def from_model(cls, model: Pix2Seq) -> Self:
        """The task as a checkpoint's config.json describes it."""
        structure = OmegaConf.structured(cls.config_type)
        try:
            config = OmegaConf.to_object(OmegaConf.merge(structure, model.task_settings[cls.name]))
        except (OmegaConfBaseException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"this checkpoint's settings of {cls.name} cannot be used: {reason}") from None
        return cls(config, model.config.vocab, model.categories, model.text)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must remember, for `from_model`."""
        return asdict(self.config)

    def with_settings(self, **changes: Any) -> Self:
        """The same task, asked or trained otherwise."""
        return type(self)(replace(self.config, **changes), self.vocab, tuple(self.categories.values()), self.text)

    @property
    def sampling(self) -> Mapping[str, Any]:
        """How this task draws its tokens."""
        return {"temperature": self.config.temperature, "top_k": self.config.top_k, "top_p": self.config.top_p}

    @property
    @abstractmethod
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Length of the longest response."""

    @property
    def cut_hint(self) -> str:
        """Why an answer was cut at its length, and what helps."""
        return f"this checkpoint's {self.length_setting} ends answers after {self.max_new_tokens} tokens"

    @abstractmethod
    def generation(self) -> GenerationConfig:
        """How a prompt of this task is answered, for `Pix2Seq.generate_mixed`."""

    def prompts(self, boxes_yxyx: NDArray[np.floating], categories: Sequence[Category]) -> NDArray[np.int64]:
        """Prompts (I, 6) about objects with boxes (I, 4) in [0, 1] of the model's input."""
        labels = np.array([category.label for category in categories], np.int64)
        return instance_prompts(self.name, boxes_yxyx, labels, self.vocab)

    @property
    def crop_padding(self) -> float | None:
        """Share of an object's box that is kept around it where every object is an image of its own; else None."""
        return None

    @abstractmethod
    def samples(self, target: Target) -> list[int | None]:
        """What of an image is a training sample: None for all of it, a number for a crop around that object."""

    @abstractmethod
    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Training sequences of a target in pixels of an input of `size` (height, width); maybe none."""


def object_prompt(task: str, target: Target, i: int, size: tuple[int, int], vocab: Vocab) -> NDArray[np.int64]:
    """The prompt (6,) about object `i` of a target in pixels of an input of `size` (height, width)."""
    box = (box_xyxy_to_yxyx(target.boxes_xyxy[i : i + 1]) / np.array([*size, *size])).astype(np.float32)
    return instance_prompts(task, box, target.labels[i : i + 1], vocab)[0]


def numbered_categories(vocab: Vocab) -> tuple[Category, ...]:
    """A class for every label, for models that came without names."""
    return tuple(Category(label, label, f"class {label}") for label in range(1, vocab.max_label + 1))
