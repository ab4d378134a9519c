"""The detection task: joins the tokenizer with a prompt, a grammar and the results people see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pix2seq.examples import Example
from pix2seq.geometry.boxes import box_area, box_xyxy_to_yxyx
from pix2seq.model.decoding.generate import Generated, GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.detection import (
    TOKENS_PER_OBJECT,
    add_noise_objects,
    decode_objects,
    encode_objects,
)
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import CLASS_BASE, EOS, NOISE, TASK_IDS


@dataclass(frozen=True)
class DetectionConfig(TaskConfig):
    """How detection is trained and asked."""

    max_objects: int = 100  # objects in a training sequence, noise included
    noise_objects: int | None = None  # invented objects a sequence; none given: fill up to max_objects, as published
    order: str = "random"  # random, area (large first) or corner (nearest to the top left first)
    class_corruption: str = "rand_n_fake_cls"  # what the decoder reads in place of the true class
    noise_weight: float = 1.0  # loss weight of the noise class
    eos_weight: float = 0.1  # loss weight of the end token, where there is one
    sequences_per_image: int = 1  # orders and noise drawn anew for each; the image is encoded once
    num_objects: int | None = None  # objects to ask for; none given: until the model ends, or max_objects
    top_p: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("random", "area", "corner"):
            raise ValueError(f"detection.order is {self.order!r}; expected random, area or corner")
        if self.max_objects < 1:
            raise ValueError(f"detection.max_objects must be at least 1, got {self.max_objects}")

    @property
    def ends(self) -> bool:
        """Whether sequences end by themselves: those that are filled with noise have no end to learn."""
        return self.noise_objects is not None


class Detection(Task[DetectionConfig]):
    """Boxes and classes of all objects in an image."""

    name = "detection"
    config_type = DetectionConfig
    scale_range = (0.3, 2.0)
    learns_from = "object"
    length_setting = "detection.max_objects"

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and end included."""
        return 2 + TOKENS_PER_OBJECT * max(self.config.max_objects, self.config.num_objects or 0)

    def samples(self, target: Target) -> list[int | None]:
        """Whole images with an object that is no crowd."""
        return [None] if (~target.iscrowd).any() else []

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
            class_corruption=config.class_corruption,  # type: ignore[arg-type]
            noise_weight=config.noise_weight,
            eos_weight=config.eos_weight if config.ends else None,
        )
        return Example(self.prompt(), response.inputs, response.targets, response.weights)

    def prompt(self) -> NDArray[np.int64]:
        """The task's id, (1,)."""
        return np.array([TASK_IDS[self.name]], np.int64)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a list of objects, or None where its length is given."""
        return EOS if self.config.ends and self.config.num_objects is None else None

    def grammar(self) -> BoxGrammar:
        """Boxes with area, real or noise classes, and an end where the model was taught one."""
        return BoxGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            class_base=CLASS_BASE,
            max_label=self.max_label,
            noise_id=NOISE,
            eos_id=self.eos_id,
        )

    @property
    def cut_hint(self) -> str:
        """See `Task`."""
        return f"the list was full after {self.config.max_objects} objects: ask for more with --num-objects"

    def generation(self) -> GenerationConfig:
        """See `Task`; the best real class is asked for wherever a class comes next."""
        return GenerationConfig(
            self.max_new_tokens,
            grammar=self.grammar(),
            eos_id=self.eos_id,
            score_range=self.score_range,
            score_steps=(TOKENS_PER_OBJECT, TOKENS_PER_OBJECT - 1),
            with_logprobs=False,
            **self.sampling,
        )

    @property
    def max_new_tokens(self) -> int:
        """Length of a full response."""
        return TOKENS_PER_OBJECT * (self.config.num_objects or self.config.max_objects)

    @property
    def score_range(self) -> tuple[int, int]:
        """Ids of the real classes, as [first, past the last)."""
        return CLASS_BASE + 1, CLASS_BASE + 1 + self.max_label

    def decode(self, out: Generated, row: int) -> tuple[NDArray[np.float32], list[Category], NDArray[np.float32]]:
        """Boxes (N, 4) `xyxy` in [0, 1], categories and scores (N,) of a generated row, best first."""
        assert out.best_tokens is not None
        assert out.best_logprobs is not None
        objects = decode_objects(
            out.tokens[row].cpu().numpy(),
            out.best_tokens[row].cpu().numpy(),
            out.best_logprobs[row].float().cpu().numpy(),
            self.vocab,
        )
        known = np.array([label in self.categories for label in objects.labels.tolist()], bool)
        order = np.argsort(-objects.scores, kind="stable")
        order = order[(objects.readable & known)[order]] if len(order) else order
        return (
            box_xyxy_to_yxyx(objects.boxes_yxyx[order]),
            [self.categories[label] for label in objects.labels[order].tolist()],
            objects.scores[order],
        )

    def instances(
        self, out: Generated, row: int, to_pixels: NDArray[np.floating], limits: tuple[int, int]
    ) -> list[Instance]:
        """Objects of a row in pixels of the original image.

        `to_pixels` (2,) is width and height of the model's whole input in original pixels, `limits`
        the image's own (width, height), to which boxes are clipped; what lies in the padding goes.
        """
        boxes, categories, scores = self.decode(out, row)
        boxes = np.clip(boxes * np.tile(to_pixels, 2), 0, np.tile(limits, 2))
        return [
            Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), category, float(score))
            for b, category, score in zip(boxes, categories, scores, strict=True)
            if b[2] > b[0] and b[3] > b[1]
        ]


def object_order(boxes_yxyx: NDArray[np.float32], order: str, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (N,) in which objects are written."""
    if order == "area":
        return np.argsort(-box_area(boxes_yxyx), kind="stable")
    if order == "corner":
        return np.argsort((boxes_yxyx[:, :2] ** 2).sum(axis=1), kind="stable")
    return rng.permutation(len(boxes_yxyx))
