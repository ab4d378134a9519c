"""From a data set to training samples, each a function of (seed, epoch, index)."""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from pix2seq.data.image import read_image
from pix2seq.data.target import Dataset, Target
from pix2seq.data.transforms import AugmentConfig, color_jitter, random_affine, transform_target
from pix2seq.errors import InputError
from pix2seq.keypoint_ops import mirror_order
from pix2seq.tasks.example import Example, Sample

MAX_UNREADABLE = 10


class ExampleMaker(Protocol):
    """The part of a task that training data needs."""

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]: ...


class TrainingSet(torch.utils.data.Dataset[Sample]):
    """Reads a picture, moves it and its labels by one affine map, and lets the task write sequences.

    Pictures without an object that could be learned from are left out.
    """

    def __init__(
        self, dataset: Dataset, task: ExampleMaker, *, size: tuple[int, int], augment: AugmentConfig, seed: int
    ) -> None:
        self.dataset = dataset
        self.task = task
        self.size = size
        self.augment = augment
        self.seed = seed
        names = max((category.keypoints for category in dataset.categories), key=len, default=())
        self.mirror_order = mirror_order(names)
        self.indices = [i for i in range(len(dataset)) if (~dataset.target(i).iscrowd).any()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Sample `index` as it is in `epoch`: key is (epoch, index).

        A picture that cannot be read is named in a warning, and the next one takes its place. Raises
        `InputError` where `MAX_UNREADABLE` in a row cannot be read.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        target, image = self._read(index)
        affine = random_affine(image.shape[:2], self.size, self.augment, rng)
        pixels = color_jitter(affine.image(image, self.size), self.augment, rng)
        moved = transform_target(
            target, affine, self.size, min_visible=self.augment.min_visible, mirror_order=self.mirror_order
        )
        return Sample(pixels, self.task.examples(moved, self.size, rng), target.image.id)

    def _read(self, index: int) -> tuple[Target, NDArray[np.uint8]]:
        for attempt in range(MAX_UNREADABLE):
            target = self.dataset.target(self.indices[(index + attempt) % len(self)])
            try:
                return target, read_image(target.image.path)
            except InputError as error:
                last = error
                warnings.warn(f"skipped in training: {error}", stacklevel=2)
        raise InputError(f"{MAX_UNREADABLE} pictures in a row could not be read, at last: {last}")
