"""The detection task: joins the tokenizer with a prompt, a grammar and the results people see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pix2seq.examples import Example
from pix2seq.geometry.boxes import box_area, box_xyxy_to_yxyx
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar
from pix2seq.settings import NonNegativeFloat, PositiveShare, Range
from pix2seq.tasks.objects import Objects, calibrated_instances, instance_at
from pix2seq.tasks.request import EncodedImage, Frame, Request
from pix2seq.tasks.task import Confidence, Judge, Task, TaskConfig, Verdict
from pix2seq.tokenizers.detection import (
    TOKENS_PER_OBJECT,
    ClassCorruption,
    add_noise_objects,
    decode_objects,
    encode_objects,
)
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import CLASS_BASE, EOS, NOISE, PAD

if TYPE_CHECKING:
    from pix2seq.drawing import Canvas
    from pix2seq.metrics.calibration import TaskCalibration
    from pix2seq.metrics.coco_ap import ApMetric

ObjectOrder = Literal["random", "area", "corner"]
NOISE_CATEGORY = Category(NOISE, NOISE, "noise")  # of invented objects, where training sequences are shown


@dataclass(frozen=True)
class DetectionConfig(TaskConfig):
    """How detection is trained and asked."""

    section = "detection"

    max_objects: Objects = 100  # in a training sequence, noise included
    # Invented objects a sequence; none given: fill up to max_objects, as published.
    noise_objects: Annotated[int, Range(least=0, most=10_000)] | None = None
    order: ObjectOrder = "random"  # area: large first; corner: nearest to the top left first
    class_corruption: ClassCorruption = "rand_n_fake_cls"  # what the decoder reads in place of the true class
    noise_weight: NonNegativeFloat = 1.0  # loss weight of the noise class
    eos_weight: NonNegativeFloat = 0.1  # loss weight of the end token, where there is one
    # Orders and noise are drawn anew for each; the image is encoded once.
    sequences_per_image: Annotated[int, Range(least=1, most=1000)] = 1
    num_objects: Objects | None = None  # objects to ask for; none given: until the model ends, or max_objects
    reward: Literal["recall", "precision"] = "recall"  # as published; precision: average precision in the image
    # In reward tuning, of teaching classes of sampled boxes the IoU as their probability; 0: rewarded as other tokens.
    confidence_weight: NonNegativeFloat = 0.3
    top_p: PositiveShare = 0.4

    @property
    def ends(self) -> bool:
        """Whether sequences end by themselves: those that are filled with noise have no end to learn."""
        return self.noise_objects is not None


class Detection(Task[DetectionConfig]):
    """Boxes and classes of all objects in an image."""

    name = "detection"
    config_type = DetectionConfig
    main_metric = "AP"
    metric_prefix = ""
    hub_pipeline = "object-detection"
    length_setting = "detection.max_objects"

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""
        return 2 + TOKENS_PER_OBJECT * max(self.config.max_objects, self.config.num_objects or 0)

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Training sequences of a target in pixels of an input of `size` (height, width)."""
        real = ~target.iscrowd
        boxes = (box_xyxy_to_yxyx(target.boxes_xyxy[real]) / np.array([*size, *size])).astype(np.float32)
        labels = target.labels[real]
        return [self._example(boxes, labels, rng) for _ in range(self.config.sequences_per_image)]

    def _example(self, boxes: NDArray[np.float32], labels: NDArray[np.int64], rng: np.random.Generator) -> Example:
        config = self.config
        order = object_order(boxes, config.order, rng)[: config.max_objects]
        boxes, labels = boxes[order], labels[order]
        room = config.max_objects - len(boxes)
        num_noise = room if config.noise_objects is None else min(config.noise_objects, room)
        boxes, labels = add_noise_objects(boxes, labels, num_noise, rng)
        response = encode_objects(
            boxes,
            labels,
            self.vocab,
            rng,
            num_labels=self.max_label,
            class_corruption=config.class_corruption,
            noise_weight=config.noise_weight,
            eos_weight=config.eos_weight if config.ends else None,
        )
        return Example(self.prompt(), response.inputs, response.targets, response.weights)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a list of objects, or None if its length is given."""
        return EOS if self.config.ends and self.config.num_objects is None else None

    def grammar(self) -> BoxGrammar:
        """Return the grammar: boxes with area, real or noise classes, and an end if the model was taught one."""
        return BoxGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            class_base=CLASS_BASE,
            max_label=self.max_label,
            noise_id=NOISE,
            eos_id=self.eos_id,
        )

    def generation(self) -> GenerationConfig:
        """Return how a list of objects is generated, with the best real class wherever a class comes next."""
        return GenerationConfig(
            TOKENS_PER_OBJECT * (self.config.num_objects or self.config.max_objects),
            grammar=self.grammar(),
            eos_id=self.eos_id,
            score_range=(CLASS_BASE + 1, CLASS_BASE + 1 + self.max_label),
            score_steps=(TOKENS_PER_OBJECT, TOKENS_PER_OBJECT - 1),
            with_logprobs=False,
            **self.sampling,
        )

    def cut_hint(self, num_tokens: int) -> str:
        """See `Task`."""
        return f"the list was full after {self.config.max_objects} objects: ask for more with --num-objects"

    def requests(self, image: EncodedImage, about: Any) -> list[Request]:
        """See `Task`."""
        return [Request(self.prompt(), self.generation())]

    def answers(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Instance]:
        """Return the objects of an image, best first."""
        return self.instances(completions[0], image.frame(), image.size)

    def parts(
        self, image: EncodedImage, request: Request, completion: Completion
    ) -> list[tuple[int, int, Instance | None]]:
        """See `Task`: five tokens an object; noise objects and boxes outside the image are none."""
        end = np.flatnonzero(completion.tokens[0] == EOS)
        length = int(end[0]) if len(end) else completion.tokens.shape[1]
        found: list[tuple[int, int, Instance | None]] = []
        for start in range(0, length - length % TOKENS_PER_OBJECT, TOKENS_PER_OBJECT):
            stop = start + TOKENS_PER_OBJECT
            objects = self.instances(completion.steps(start, stop), request.frame(image), image.size)
            found.append((start, stop, objects[0] if objects else None))
        return found

    def instances(self, completion: Completion, frame: Frame, size: tuple[int, int]) -> list[Instance]:
        """Read objects, best first, in pixels of an image of `size` (width, height).

        Boxes are clipped to the image; those that lie in the padding are left out.
        """
        assert completion.best_tokens is not None
        assert completion.best_logprobs is not None
        objects = decode_objects(
            completion.tokens[0], completion.best_tokens[0], completion.best_logprobs[0], self.vocab
        )
        known = np.array([label in self.categories for label in objects.labels.tolist()], bool)
        order = np.argsort(-objects.scores, kind="stable")
        order = order[(objects.readable & known)[order]] if len(order) else order
        corners = frame.to_image_xy(objects.boxes_yxyx[order].reshape(-1, 2, 2)).reshape(-1, 4)
        boxes = np.clip(corners, 0, np.tile(size, 2))
        return [
            Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), self.categories[label], float(score))
            for b, label, score in zip(boxes, objects.labels[order].tolist(), objects.scores[order], strict=True)
            if b[2] > b[0] and b[3] > b[1]
        ]

    def calibrated(self, answers: Sequence[Instance], calibration: TaskCalibration | None) -> list[Instance]:
        """Turn scores into the probability that box and class are right."""
        return list(answers) if calibration is None else calibrated_instances(answers, calibration)

    def generation_of(self, example: Example) -> GenerationConfig:
        """See `Task`."""
        return self.generation()

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Reward a list of boxes by the setting `reward`, each with its best real class, as it would be answered.

        Classes are not rewarded but taught: that of the object which a box finds, with the IoU as its probability, and
        noise otherwise. This is what the published confidence token does. Its loss is a mean over boxes where that of
        rewards is one over tokens; here both are sums over a sequence, so its weight is multiplied by the tokens of a
        box.
        """

        from pix2seq.metrics.box_rewards import precision_reward, recall_reward, true_scores  # it needs pycocotools

        def score(example: Example, completion: Completion, size: tuple[int, int]) -> Verdict:
            assert example.target is not None
            ids, shares = np.full(completion.tokens.shape, PAD), np.zeros(completion.tokens.shape)
            rewards = []
            for i, (tokens, best, logprobs) in enumerate(_scored_rows(completion)):
                objects = decode_objects(tokens, best, logprobs, self.vocab)
                boxes = box_xyxy_to_yxyx(objects.boxes_yxyx * np.array([*size, *size], np.float32))
                labels, shares_of = true_scores(boxes, example.target)
                at_class = np.arange(len(labels)) * TOKENS_PER_OBJECT + TOKENS_PER_OBJECT - 1
                ids[i, at_class] = np.where(labels, CLASS_BASE + labels, NOISE)
                shares[i, at_class] = np.where(labels, shares_of, 1.0)
                rewards.append(
                    recall_reward(boxes, objects.labels, example.target)
                    if self.config.reward == "recall"
                    else precision_reward(boxes, objects.labels, objects.scores, example.target)
                )
            weight = self.config.confidence_weight * TOKENS_PER_OBJECT
            return Verdict(np.array(rewards), Confidence(ids, shares, NOISE, weight) if weight else None)

        return score

    def metric(self, categories: Sequence[Category]) -> ApMetric:
        """See `Task`."""
        from pix2seq.metrics.coco_ap import ApMetric  # here, because asking needs neither pandas nor pycocotools

        return ApMetric(categories, "box")

    def draw(self, canvas: Canvas, answers: Sequence[Instance]) -> None:
        """Draw boxes with class names; noise boxes are thin and white, without a name."""
        canvas.instances([instance for instance in answers if instance.category != NOISE_CATEGORY])
        for instance in answers:
            if instance.category == NOISE_CATEGORY:
                canvas.thin_box(instance.box_xyxy)

    def to_json(self, answers: Sequence[Instance]) -> dict[str, Any]:
        """See `Task`."""
        return {"instances": [instance.to_json() for instance in answers]}

    def summary(self, example: Example) -> str:
        """Count real and noise objects."""
        classes = example.targets[TOKENS_PER_OBJECT - 1 :: TOKENS_PER_OBJECT]
        return f"{int((classes > NOISE).sum())} objects and {int((classes == NOISE).sum())} noise objects"

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """Return real and noise objects."""
        frame = Frame(np.zeros(2), np.array(size[::-1], np.float64))
        ids = example.targets[example.targets != EOS]
        groups = ids[: len(ids) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)
        categories = {CLASS_BASE + label: category for label, category in self.categories.items()}
        categories[NOISE] = NOISE_CATEGORY
        return [instance_at(group[:4], categories[int(group[4])], frame, self.vocab) for group in groups]


def _scored_rows(completion: Completion) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Yield the tokens of each sample with their best real classes and the log-probabilities of these."""
    assert completion.best_tokens is not None
    assert completion.best_logprobs is not None
    yield from zip(completion.tokens, completion.best_tokens, completion.best_logprobs, strict=True)


def object_order(boxes_yxyx: NDArray[np.float32], order: ObjectOrder, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (N,) in which objects are written."""
    if order == "area":
        return np.argsort(-box_area(boxes_yxyx), kind="stable")
    if order == "corner":
        return np.argsort((boxes_yxyx[:, :2] ** 2).sum(axis=1), kind="stable")
    return rng.permutation(len(boxes_yxyx))
