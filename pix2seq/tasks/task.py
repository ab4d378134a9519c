"""The seam: everything that the rest of the project needs to know of a task.

A task makes the sequences that training learns from, asks the model, reads its answers, names the metric that scores
them, draws them and writes them as JSON. A new task is a subclass of `Task` in one file; see examples/counting.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.settings import BatchSize, NonNegativeFloat, NonNegativeInt, PositiveShare, Settings
from pix2seq.tasks.request import EncodedImage, Request
from pix2seq.tokenizers.text import TextTokenizer, names_side
from pix2seq.types import Category, Target
from pix2seq.vocab import Vocab

if TYPE_CHECKING:
    from pix2seq.data.companions import Companion, ObjectsByClass
    from pix2seq.drawing import Canvas
    from pix2seq.metrics.calibration import TaskCalibration
    from pix2seq.metrics.metric import Metric
    from pix2seq.model.pix2seq import Pix2Seq


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Settings that all tasks have."""

    loss_weight: NonNegativeFloat = 1.0  # of this task's loss in the sum of all
    batch_size: BatchSize | None = None  # images of this task a step; None: the run's batch_size
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0  # 0 keeps all
    top_p: PositiveShare = 1.0  # 1 keeps all


Config = TypeVar("Config", bound=TaskConfig)


@dataclass(frozen=True)
class Confidence:
    """What tokens that say how sure the model is should have said; they are taught it in place of being rewarded."""

    ids: NDArray[np.int64]  # (S, T') PAD where a token says nothing of the kind
    shares: NDArray[np.float64]  # (S, T') the probability that an id should have; the rest goes to `otherwise`
    otherwise: int
    weight: float


@dataclass(frozen=True)
class Verdict:
    """What S sampled answers to one prompt are worth."""

    rewards: NDArray[np.float64]  # (S,)
    confidence: Confidence | None = None


Judge: TypeAlias = Callable[[Example, Completion, tuple[int, int]], Verdict]
"""Scores the samples of an example's prompt; the last argument is the (height, width) of the model's input."""


class Task(ABC, Generic[Config]):
    """One language over the shared vocabulary. An answer is a value of the task's own type."""

    name: ClassVar[str]
    config_type: ClassVar[type[TaskConfig]] = TaskConfig
    needs: ClassVar[tuple[str, ...]] = ()  # the task whose answers supply `about` where nobody gave it
    main_metric: ClassVar[str]  # chooses the best checkpoint: QUESTION/METRIC, or METRIC for the question ""
    metric_prefix: ClassVar[str | None] = None  # of metric names; None: the task's name
    graded_question: ClassVar[str] = ""  # whose answers say how far scores are probabilities, and calibrate them

    hub_pipeline: ClassVar[str | None] = None  # what the Hugging Face Hub calls such models

    learns_from: ClassVar[str] = "object"  # what an image must have: object, mask, labelled keypoint or caption
    scale_range: ClassVar[tuple[float, float]] = (0.3, 2.0)  # of the resizing jitter in training
    length_setting: ClassVar[str]  # the setting to lower if sequences are too long
    uses_classes: ClassVar[bool] = True  # whether the model must know the classes of the data
    reads_text: ClassVar[bool] = False  # whether the vocabulary must hold text
    tells_sentences: ClassVar[bool] = False  # whether examples have a `sentence`, to compare images with
    about_format: ClassVar[str | None] = None  # what `predict --about` takes, in words; None: nothing
    shows_companions: ClassVar[bool] = False  # it shows other images of a data set beside one, see `companions`
    takes_words: ClassVar[bool] = False  # it answers phrases with the objects that they name
    takes_examples: ClassVar[bool] = False  # it answers objects shown in other images with all like them; None: nothing
    takes_clicks: ClassVar[bool] = False  # it answers `Clicks` with each `ObjectMask` they can mean, None with all

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
        if self.uses_classes and self.max_label > vocab.max_label:
            raise InputError(
                f"{len(self.categories)} classes need ids up to {self.max_label}, but the vocabulary holds labels 1 "
                f"to {vocab.max_label}; raise model.vocab.coord_base"
            )
        self.text = text

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model's text. Raises `ValueError` if the model has none."""
        if self.text is None:
            raise ValueError(f"{self.name} needs a text tokenizer")
        return self.text

    @property
    @abstractmethod
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""

    @property
    def crop_padding(self) -> float | None:
        """Share of an object's box kept on each side if every object is cropped and encoded alone; else None."""
        return None

    @property
    def looks_closer(self) -> bool:
        """Whether sequences read memories of single objects, made from the image's finer maps (`encoder.closeups`)."""
        return False

    @property
    def reads_masks(self) -> bool:
        """Whether examples use masks, where an image need not have any."""
        return False

    @property
    def num_references(self) -> int:
        """How many memories a sequence reads at most beside the first, by the embeddings of `model.memory.references`.

        They are of other images, or closeups.
        """
        return 0

    @property
    def needs_about(self) -> bool:
        """Whether it cannot be asked about a whole image alone: someone has to say what to look for."""
        return self.about_format is not None and not self.needs and not self.takes_clicks

    @property
    def flips(self) -> bool:
        """Whether the task learns from mirrored images."""
        return True

    def after_flip(self, target: Target) -> Target:
        """Return what of a mirrored target is still true; captions that name a side are not."""
        return replace(target, captions=tuple(text for text in target.captions if not names_side(text)))

    def samples(self, target: Target) -> list[int | None]:
        """Return the training samples of an image: None for all of it, an index for a crop around that object."""
        from pix2seq.data.annotations import contents  # here, because it needs pandas, and asking does not

        return [None] if self.learns_from in contents(target) else []

    def companions(
        self, target: Target, objects: ObjectsByClass, rng: np.random.Generator, *, scoring: bool = False
    ) -> list[Companion]:
        """Draw the objects of other images that are shown beside this one in training, or in evaluation (`scoring`).

        It is called where the task `shows_companions`. `target` and `objects` have the labels of the data set.
        `examples` and `questions` get a target with what was drawn as its `companions`, which may have lost their
        object in a crop.
        """
        return []

    @abstractmethod
    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return the training sequences, maybe none, of a target in pixels of an input of `size` (height, width)."""

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Return what reward tuning scores samples by. `captions` are those of each training image, if it `reads_text`.

        Raises `InputError` if the task has no reward.
        """
        raise InputError(f"{self.name} has no reward; train it with objective=likelihood")

    def generation_of(self, example: Example) -> GenerationConfig:
        """Return how the answer to an example's prompt is generated; needed of tasks that have a reward."""
        raise NotImplementedError(
            f"{self.name} has a reward, and does not say how answers to rewarded prompts are made"
        )

    @classmethod
    def make_text_tokenizer(
        cls, config: TaskConfig, captions: Sequence[str], words: Sequence[str] = ()
    ) -> TextTokenizer:
        """Make the tokenizer of a task that `reads_text` from the captions of its training data.

        `words` are the `text_words` of all tasks of the run; it must know them too, however rare they are.
        """
        raise NotImplementedError(f"{cls.name} reads text; it must say how text becomes tokens")

    def with_data(self, captions: Sequence[str], categories: Sequence[Category]) -> Self:
        """Return the task for targets of a data set.

        `captions` are those of all its images, for a task that has to know others than an image's own. `categories` say
        what the labels of its targets mean; a task that `uses_classes` has the model's.
        """
        return self if self.uses_classes else type(self)(self.config, self.vocab, categories, self.text)

    @classmethod
    def text_words(cls, categories: Sequence[Category], attributes: Sequence[Mapping[str, str]]) -> list[str]:
        """Return what the task reads beside captions, about objects of these classes and attributes, to learn words."""
        return []

    def summary(self, example: Example) -> str:
        """Describe a training sequence in a few words, for `pix2seq data sequences`."""
        return f"{len(example.targets)} tokens"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Any]:
        """Return what a training sequence says as answers in pixels of an input of `size` (height, width)."""
        return []

    def prompt(self) -> NDArray[np.int64]:
        """Return the prompt that is the task's id alone, (1,)."""
        return np.array([self.vocab.task_id(self.name)], np.int64)

    @abstractmethod
    def requests(self, image: EncodedImage, about: Any) -> list[Request]:
        """Return the questions to ask about an image; `about` went through `check_about`."""

    def follow_up(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Request]:
        """Return requests that build on what the model said to these and take their place; none if that is the answer.

        So a question can be answered in steps: a box from the whole image, then its outline from a closeup.
        """
        return []

    @abstractmethod
    def answers(self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Any]:
        """Read what the model said to each request of the last step, in pixels of the original image."""

    def calibrated(self, answers: Sequence[Any], calibration: TaskCalibration | None) -> list[Any]:
        """Turn scores into probabilities; None: the checkpoint is not calibrated for this task."""
        return list(answers)

    def parts(self, image: EncodedImage, request: Request, completion: Completion) -> list[tuple[int, int, Any]]:
        """Return which tokens of a response, from start to stop, say which answer, for people who look at sequences.

        `completion` is that of `request` alone. Positions count from the first token of the response; a stop beyond
        the last one means the last one. Objects may be without what this task adds to them. By default all tokens say
        the one answer to the request, or none.
        """
        answers = self.answers(image, [request], [completion])
        return [(0, completion.tokens.shape[1], answers[0] if len(answers) == 1 else None)]

    def parse_about(self, text: str) -> Any:
        """Read the text of `predict --about`. Raises `InputError` if it is not of the `about_format`."""
        raise InputError(f"{self.name} takes no --about; it is asked about whole images")

    def encoded(self, abouts: Sequence[Any], encode: Callable[[Sequence[Any]], list[EncodedImage]]) -> list[Any]:
        """Encode the images that users ask about by, in what they ask about each image."""
        return list(abouts)

    def check_about(self, image: EncodedImage, about: Any) -> Any:
        """Bring what a user asks about into the form that `requests` takes. Raises `InputError` if it cannot be."""
        return about

    def subjects(self, found: Sequence[Any]) -> Any:
        """Choose what to ask about from the answers of the task that this one `needs`."""
        return list(found)

    def merge(self, found: Sequence[Any], answers: Sequence[Any]) -> list[Any]:
        """Put this task's answers onto the answers of the task that it `needs`."""
        return [*found, *answers]

    def cut_hint(self, num_tokens: int) -> str:
        """Say why an answer was cut after `num_tokens`, and what helps."""
        return f"this checkpoint's {self.length_setting} ends answers after {num_tokens} tokens"

    @property
    def sampling(self) -> Mapping[str, Any]:
        """How tokens are drawn, as settings of `GenerationConfig`."""
        return {"temperature": self.config.temperature, "top_k": self.config.top_k, "top_p": self.config.top_p}

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Any]:
        """Return what evaluation asks about an image: `about` by a name that goes into the metric's.

        `target` has the model's labels. `found` are the answers of the task that this one `needs`, None if the
        checkpoint does not know it.
        """
        return {"": None}

    def rehearsal(self, target: Target, seed: int) -> Any:
        """Return what to ask about a training image so that the answers teach; None if this task learns from none."""
        return None

    def records(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the answers to a `rehearsal` as JSON values, to be learned from."""
        return []

    def timed(self, target: Target) -> dict[str, Any]:
        """Return questions that evaluation asks one at a time to time them: `about` by the metric, in milliseconds."""
        return {}

    @abstractmethod
    def metric(self, categories: Sequence[Category]) -> Metric:
        """Return a new metric for one question over a data set with these `categories`."""

    @classmethod
    def metric_name(cls, metric: str, question: str = "") -> str:
        """Return the full name of a metric: `AP`, `segmentation/true_boxes/AP50`."""
        prefix = cls.name if cls.metric_prefix is None else cls.metric_prefix
        return "/".join(part for part in (prefix, question, metric) if part)

    @abstractmethod
    def draw(self, canvas: Canvas, answers: Sequence[Any]) -> None:
        """Draw answers about one image."""

    def to_json(self, answers: Sequence[Any]) -> dict[str, Any]:
        """Return the entries of NAME.json: under the task's own name, what each answer's `to_json` gives."""
        return {self.name: [answer.to_json() for answer in answers]}

    @classmethod
    def from_model(cls, model: Pix2Seq) -> Self:
        """Return the task as a checkpoint's config.json describes it."""
        return cls.from_settings(model.task_settings[cls.name], model.config.vocab, model.categories, model.text)

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], vocab: Vocab, categories: Sequence[Category], text: TextTokenizer | None
    ) -> Self:
        """Return the task with `settings` as a checkpoint remembers them."""
        return cls(cls._changed(cls.config_type, settings, "this checkpoint's settings"), vocab, categories, text)

    def settings(self) -> dict[str, Any]:
        """Return what a checkpoint must remember, for `from_model`."""
        return asdict(self.config)

    def with_settings(self, **changes: Any) -> Self:
        """Return the same task with other settings. Raises `InputError` if one has a wrong type or range."""
        config = self._changed(self.config, changes, "settings")
        return type(self)(config, self.vocab, tuple(self.categories.values()), self.text)

    @classmethod
    def _changed(cls, config: TaskConfig | type[TaskConfig], changes: Mapping[str, Any], whose: str) -> Any:
        """Return a config, or the defaults of its type, with `changes` of the right types and ranges."""
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), changes))
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{whose} of {cls.name} cannot be used: {reason}") from None


def numbered_categories(vocab: Vocab) -> tuple[Category, ...]:
    """Return a class for every label, for models without class names."""
    return tuple(Category(label, label, f"class {label}") for label in range(1, vocab.max_label + 1))
