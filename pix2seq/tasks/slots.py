"""What tasks have in common whose prompt says what a slot stands for, and whose answer is all objects of the slots.

A slot is an id without a meaning of its own, drawn anew for every training sequence. So the model cannot learn what a
slot is; it has to read the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pix2seq.examples import Example, OtherView
from pix2seq.geometry.boxes import box_xyxy_to_yxyx
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar
from pix2seq.settings import NonNegativeFloat, PositiveShare, Range, Share
from pix2seq.tasks.objects import Objects, calibrated_instances, instance_at
from pix2seq.tasks.request import EncodedImage, Frame
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.tokenizers.detection import NOISE_LABEL, TOKENS_PER_OBJECT, DetectionResponse, add_noise_objects
from pix2seq.tokenizers.slots import NO_SLOT, class_choices, decode_found, encode_found
from pix2seq.types import Category, Instance, Target
from pix2seq.vocab import EOS, NOISE, SLOTS

if TYPE_CHECKING:
    from pix2seq.metrics.calibration import TaskCalibration


@dataclass(frozen=True)
class SlotConfig(TaskConfig):
    """How objects of slots are trained and asked for."""

    max_objects: Objects = 100  # in an answer, noise included
    noise_objects: Annotated[int, Range(least=0, most=10_000)] = 4  # objects of no slot, and boxes of none, in training
    class_weight: NonNegativeFloat = 3.0  # loss weight of slots and noise, which say what the prompt means
    eos_weight: NonNegativeFloat = 0.1  # loss weight of the end
    min_score: Share = 0.5  # least score of an object that counts as found
    top_p: PositiveShare = 0.4


Config = TypeVar("Config", bound=SlotConfig)


class SlotTask(Task[Config]):
    """All objects of what a prompt describes."""

    uses_classes = False

    def learned(
        self,
        prompt: NDArray[np.int64],
        slots: NDArray[np.int64],
        asked: range,
        target: Target,
        size: tuple[int, int],
        rng: np.random.Generator,
        others: tuple[OtherView, ...] = (),
    ) -> Example:
        """Return the sequence of a prompt that asks for the slots `asked`.

        `slots` (N,) are those of the target's objects, `NO_SLOT` for none; `others` are what is read beside the image.
        """
        real = ~target.iscrowd
        boxes = (box_xyxy_to_yxyx(target.boxes_xyxy[real]) / np.array([*size, *size])).astype(np.float32)
        response = self._response(boxes, slots[real], asked, rng)
        return Example(
            prompt,
            response.inputs,
            response.targets,
            response.weights,
            # Otherwise most of what is learned at first is which slot the prompt names, and not what it means.
            choices=class_choices(len(response.targets), asked),
            others=others,
        )

    def _response(
        self, boxes: NDArray[np.float32], slots: NDArray[np.int64], asked: range, rng: np.random.Generator
    ) -> DetectionResponse:
        """Return what is answered: objects of slots mixed with others, then boxes without an object.

        If objects of slots came first, where a box stands would say more of its class than the prompt does.
        """
        config = self.config
        order = rng.permutation(len(boxes))
        meant = order[slots[order] != NO_SLOT][: config.max_objects]
        num_noise = min(config.noise_objects, config.max_objects - len(meant))
        others = order[slots[order] == NO_SLOT][:num_noise]
        objects = rng.permutation(np.append(meant, others))
        # Noise is made from all objects, so that it says nothing about which are meant.
        noisy, labels = add_noise_objects(boxes, np.ones(len(boxes), np.int64), num_noise - len(others), rng)
        noise = noisy[labels == NOISE_LABEL]
        return encode_found(
            np.concatenate([boxes[objects], noise]),
            np.append(slots[objects], np.full(len(noise), NO_SLOT)),
            np.arange(len(objects) + len(noise)) < len(objects),
            asked,
            self.vocab,
            rng,
            class_weight=config.class_weight,
            eos_weight=config.eos_weight,
        )

    def shown(self, example: Example, size: tuple[int, int]) -> list[Instance]:
        """Return the objects of slots."""
        ids = example.targets[example.targets != EOS]
        groups = ids[: len(ids) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)
        frame = Frame.of_input(size)
        return [
            instance_at(group[:4], slot_category(int(group[4]) - SLOTS[0]), frame, self.vocab)
            for group in groups
            if group[4] != NOISE
        ]

    def generation(self, num_slots: int) -> GenerationConfig:
        """Return how objects of the first slots are generated, with the likeliest slot wherever a class comes next."""
        grammar = BoxGrammar(
            coord_base=self.vocab.coord_base,
            num_bins=self.vocab.num_bins,
            class_base=SLOTS[0] - 1,
            max_label=num_slots,
            noise_id=NOISE,
            eos_id=EOS,
        )
        return GenerationConfig(
            TOKENS_PER_OBJECT * self.config.max_objects + 1,
            grammar=grammar,
            eos_id=EOS,
            score_range=(SLOTS[0], SLOTS[0] + num_slots),
            score_steps=(TOKENS_PER_OBJECT, TOKENS_PER_OBJECT - 1),
            with_logprobs=False,
            score_allowed=True,
            **self.sampling,
        )

    def found_parts(
        self, image: EncodedImage, completion: Completion, names: Sequence[str]
    ) -> list[tuple[int, int, Instance | None]]:
        """Return the tokens of each object, see `Task.parts`: five an object; boxes outside the image are none."""
        end = np.flatnonzero(completion.tokens[0] == EOS)
        length = int(end[0]) if len(end) else completion.tokens.shape[1]
        found: list[tuple[int, int, Instance | None]] = []
        for start in range(0, length - length % TOKENS_PER_OBJECT, TOKENS_PER_OBJECT):
            stop = start + TOKENS_PER_OBJECT
            objects = self.instances(image, completion.steps(start, stop), names)
            found.append((start, stop, objects[0] if objects else None))
        return found

    def instances(self, image: EncodedImage, completion: Completion, names: Sequence[str]) -> list[Instance]:
        """Return objects, best first, in pixels of the image; slots have these names."""
        assert completion.best_tokens is not None
        assert completion.best_logprobs is not None
        objects = decode_found(completion.tokens[0], completion.best_tokens[0], completion.best_logprobs[0], self.vocab)
        known = objects.readable & (objects.labels <= len(names))
        order = np.argsort(-objects.scores, kind="stable")
        order = order[known[order]]
        corners = image.frame().to_image_xy(objects.boxes_yxyx[order].reshape(-1, 2, 2)).reshape(-1, 4)
        boxes = np.clip(corners, 0, np.tile(image.size, 2)).tolist()
        found = zip(boxes, objects.labels[order].tolist(), objects.scores[order].tolist(), strict=True)
        return [
            Instance((x0, y0, x1, y1), slot_category(label - 1, names[label - 1]), score)
            for (x0, y0, x1, y1), label, score in found
            if x1 > x0 and y1 > y0
        ]

    def calibrated(self, answers: Sequence[Any], calibration: TaskCalibration | None) -> list[Any]:
        """See `Task`; an exam's answers stay as they are."""
        if calibration is None or not all(isinstance(each, Instance) for each in answers):
            return list(answers)
        return calibrated_instances(answers, calibration)


def slot_category(slot: int, name: str | None = None) -> Category:
    """Return the class of a slot, numbered from 0."""
    return Category(slot + 1, slot + 1, f"slot {slot + 1}" if name is None else name)
