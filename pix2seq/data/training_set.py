"""From a data set to training samples, each a function of (seed, epoch, index)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from pix2seq.data.image import read_image
from pix2seq.data.target import Dataset, Target
from pix2seq.data.transforms import AugmentConfig, color_jitter, crop_to_object, random_affine, transform_target
from pix2seq.errors import InputError
from pix2seq.keypoint_ops import mirror_order
from pix2seq.tasks.example import Example, Sample

MAX_UNREADABLE = 10
WHOLE = -1  # in place of an object's number


class ExampleMaker(Protocol):
    """The part of a task that training data needs; see `pix2seq.tasks.task.Task`."""

    @property
    def name(self) -> str: ...
    @property
    def scale_range(self) -> tuple[float, float]: ...
    @property
    def crop_padding(self) -> float | None: ...
    def places(self, target: Target) -> list[int | None]: ...
    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]: ...


class TrainingSet(torch.utils.data.Dataset[Sample]):
    """Reads a picture, moves it and its labels by one affine map, and lets the task write sequences.

    What a task cannot learn from is left out: `places` holds an (image, object) for each sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        task: ExampleMaker,
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        labels: Mapping[int, int] | None = None,
    ) -> None:
        """`labels` maps the data set's labels to the model's; none given, they are the same."""
        self.dataset = dataset
        self.task = task
        self.size = size
        self.augment = augment
        self.seed = seed
        self.mirror_orders = {
            category.label if labels is None else labels[category.label]: mirror_order(category.keypoints)
            for category in dataset.categories
            if category.keypoints
        }
        self._labels = None
        if labels is not None:
            self._labels = np.zeros(max(labels, default=0) + 1, np.int64)
            self._labels[list(labels)] = list(labels.values())
        found = [
            (image, WHOLE if place is None else place)
            for image in range(len(dataset))
            for place in task.places(self._target(image))
        ]
        self.places = np.array(found, np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Sample `index` as it is in `epoch`: key is (epoch, index).

        A picture that cannot be read is named in a warning, and the next one takes its place. Raises
        `InputError` where `MAX_UNREADABLE` in a row cannot be read.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        target, image = self._read(index)
        affine = random_affine(image.shape[:2], self.size, self.augment, rng, scale_range=self.task.scale_range)
        pixels = color_jitter(affine.image(image, self.size), self.augment, rng)
        moved = transform_target(
            target,
            affine,
            self.size,
            min_visible=self.augment.min_visible,
            mirror_orders=self.mirror_orders,
            with_masks=self.task.name == "segmentation",
        )
        return Sample(pixels, self.task.examples(moved, self.size, rng), target.image.id)

    def _read(self, index: int) -> tuple[Target, NDArray[np.uint8]]:
        for attempt in range(MAX_UNREADABLE):
            image_index, place = self.places[(index + attempt) % len(self)].tolist()
            target = self._target(image_index)
            try:
                image = read_image(target.image.path)
            except InputError as error:
                last = error
                warnings.warn(f"skipped in training: {error}", stacklevel=2)
                continue
            if place != WHOLE and self.task.crop_padding is not None:
                return crop_to_object(target, image, place, self.task.crop_padding)
            return target, image
        raise InputError(f"{MAX_UNREADABLE} pictures in a row could not be read, at last: {last}")

    def _target(self, image_index: int) -> Target:
        target = self.dataset.target(image_index)
        return target if self._labels is None else replace(target, labels=self._labels[target.labels])
