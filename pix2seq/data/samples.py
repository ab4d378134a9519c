"""From a data set to training samples, each a function of (seed, epoch, index)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from pix2seq.data.annotations import WHOLE, find_places
from pix2seq.data.dataset import Dataset
from pix2seq.data.defects import MAX_BAD_SHARE, SKIPPED, Defect, refuse_bad_share
from pix2seq.data.formats.shards import ShardIndex, ShardStream
from pix2seq.data.image import read_record_image
from pix2seq.data.transforms import AugmentConfig, color_jitter, crop_to_object, random_affine, transform_target
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample
from pix2seq.geometry.keypoints import mirror_order
from pix2seq.types import Category, Target


class ExampleMaker(Protocol):
    """The part of a task that training data needs; see `pix2seq.tasks.task.Task`."""

    @property
    def name(self) -> str: ...
    @property
    def learns_from(self) -> str: ...
    @property
    def scale_range(self) -> tuple[float, float]: ...
    @property
    def crop_padding(self) -> float | None: ...
    def places(self, target: Target) -> list[int | None]: ...
    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]: ...


class SampleMaker:
    """Moves an image and its labels by one affine map, and lets the task write sequences."""

    def __init__(
        self,
        categories: Sequence[Category],
        task: ExampleMaker,
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        labels: Mapping[int, int] | None = None,
    ) -> None:
        """`labels` maps the labels of `categories` to the model's; none given, they are the same."""
        self.task = task
        self.size = size
        self.augment = augment
        self.mirror_orders = {
            category.label if labels is None else labels[category.label]: mirror_order(category.keypoints)
            for category in categories
            if category.keypoints
        }
        self._labels = None
        if labels is not None:
            self._labels = np.zeros(max(labels, default=0) + 1, np.int64)
            self._labels[list(labels)] = list(labels.values())

    def target(self, target: Target) -> Target:
        """A target of the data set, in the model's labels."""
        return target if self._labels is None else replace(target, labels=self._labels[target.labels])

    def sample(self, target: Target, image: NDArray[np.uint8], place: int | None, rng: np.random.Generator) -> Sample:
        """A sample of an image (H, W, 3), or of a crop around its object `place`."""
        if place is not None and self.task.crop_padding is not None:
            target, image = crop_to_object(target, image, place, self.task.crop_padding)
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


class TrainingSet(torch.utils.data.Dataset[Sample]):
    """The samples of a data set in memory by (epoch, index).

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
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:
        """`labels` as for `SampleMaker`. `max_bad_share` (0 to 1) of the images may turn out unusable."""
        self.dataset = dataset
        self.task = task
        self.seed = seed
        self.maker = SampleMaker(dataset.categories, task, size=size, augment=augment, labels=labels)
        each_object = task.crop_padding is not None
        self.places = find_places(dataset.annotations, task.learns_from, each_object=each_object)
        self.max_bad_share = max_bad_share
        self._tried = np.zeros(len(dataset), np.bool_)  # images that this process has read
        self._bad: dict[int, Defect] = {}  # of these, the ones that cannot be used

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Sample `index` as it is in `epoch`: key is (epoch, index).

        An image that cannot be read, or is not of the annotations' size, is named in a warning, and the
        next one takes its place. Raises `BadShareError` where more than `max_bad_share` of those that
        this process has read, and ten or more, were such.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        for step in range(len(self)):
            image_index, place = self.places[(index + step) % len(self)].tolist()
            target = self.dataset.target(image_index)
            self._tried[image_index] = True
            try:
                image = read_record_image(target.image)
            except InputError as error:
                self._skip(image_index, target.image.id, str(error))
                continue
            return self.maker.sample(self.maker.target(target), image, None if place == WHOLE else place, rng)
        raise InputError(f"{self.dataset.root} has no image that can be read; see pix2seq data check")

    def _skip(self, image_index: int, image_id: int, reason: str) -> None:
        if image_index in self._bad:
            return
        warnings.warn(f"skipped in training: {reason}", stacklevel=3)
        self._bad[image_index] = (image_id, None, reason, SKIPPED, "")
        num_tried = int(np.count_nonzero(self._tried))
        bad = list(self._bad.values())
        refuse_bad_share("images", bad, num_tried, where=self.dataset.root, max_bad_share=self.max_bad_share)


class TrainingStream:
    """The samples of a split in shards, one for each image that the task can learn from.

    They come in the order of `ShardStream`, which depends on how many readers there are. Where every object
    is an image of its own, one of them is drawn each epoch.
    """

    def __init__(
        self,
        index: ShardIndex,
        task: ExampleMaker,
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        labels: Mapping[int, int] | None = None,
        mix: int = 4,
    ) -> None:
        """`labels` as for `SampleMaker`; each reader holds `mix` shards in memory."""
        self.index = index
        self.task = task
        self.seed = seed
        self.mix = mix
        self.maker = SampleMaker(index.categories, task, size=size, augment=augment, labels=labels)

    def __len__(self) -> int:
        return self.index.num_with(self.task.learns_from)

    def lane(self, lane: int, num_lanes: int, *, start: int = 0) -> Iterator[Sample]:
        """The endless samples of one of `num_lanes` readers, from its sample `start` on.

        Raises `InputError`, also while reading, where shards are too few, missing or damaged.
        """
        stream = ShardStream(
            self.index,
            seed=self.seed,
            lane=lane,
            num_lanes=num_lanes,
            mix=self.mix,
            start=start,
            learns_from=self.task.learns_from,
        )
        return self._samples(stream)

    def _samples(self, stream: ShardStream) -> Iterator[Sample]:
        for shard_sample in stream:
            rng = np.random.default_rng((self.seed, shard_sample.epoch, shard_sample.number))
            target = self.maker.target(shard_sample.target)
            try:
                image = read_record_image(target.image, shard_sample.image)
            except InputError as error:  # it could be read when the shards were written
                name = f"{self.index.location}: {target.image.path}"
                raise InputError(f"{name}: {error}, and write the shards anew") from None
            places = self.task.places(target)
            yield self.maker.sample(target, image, places[int(rng.integers(len(places)))], rng)
