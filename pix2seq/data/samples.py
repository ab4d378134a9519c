"""Training samples of a data set, each a function of (seed, epoch, index)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from pix2seq.data.annotations import WHOLE_IMAGE, contents, find_samples
from pix2seq.data.companions import Companion, ObjectsByClass
from pix2seq.data.dataset import ClassMap
from pix2seq.data.defects import MAX_BAD_SHARE, SKIPPED, Defect, refuse_bad_share
from pix2seq.data.features import FeatureStore, StoredImage
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.shards import ShardIndex, ShardStream
from pix2seq.data.image import read_record_image
from pix2seq.data.targets import crop_to_object, transform_target
from pix2seq.data.transforms import AugmentConfig, augmented_pixels, random_affine
from pix2seq.errors import InputError, unknown_name
from pix2seq.examples import Example, Sample
from pix2seq.geometry.affine import Affine
from pix2seq.geometry.keypoints import find_points, mirror_order
from pix2seq.types import Category, ImageRecord, Target

Shown: TypeAlias = "tuple[Target, NDArray[np.uint8] | StoredImage]"
"""An image that is shown beside another one, with its annotations."""


class ExampleMaker(Protocol):
    """What this module needs of a task; see `pix2seq.tasks.task.Task`."""

    @property
    def name(self) -> str: ...
    @property
    def learns_from(self) -> str: ...
    @property
    def reads_masks(self) -> bool: ...
    @property
    def scale_range(self) -> tuple[float, float]: ...
    @property
    def crop_padding(self) -> float | None: ...
    @property
    def flips(self) -> bool: ...
    @property
    def shows_companions(self) -> bool: ...
    def after_flip(self, target: Target) -> Target: ...
    def samples(self, target: Target) -> list[int | None]: ...
    def companions(self, target: Target, objects: ObjectsByClass, rng: np.random.Generator) -> list[Companion]: ...
    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]: ...


class SampleMaker:
    """Maps an image and its labels by one affine map and lets each task write its sequences."""

    def __init__(
        self,
        categories: Sequence[Category],
        tasks: Sequence[ExampleMaker],
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        classes: ClassMap | None = None,
    ) -> None:
        """`classes` brings targets to the model's; by default the model's are `categories`.

        The scale jitter is what all tasks allow. Raises `InputError` if they allow none in common, and if
        `augment.flip_pairs` names a point that no class has.
        """
        self.tasks = tasks
        self.size = size
        self.augment = augment if any(task.flips for task in tasks) else replace(augment, flip=0.0)
        self.scale_range = _common_scales(tasks, augment)
        self.with_masks = any(task.learns_from == "mask" or task.reads_masks for task in tasks)
        self.classes = classes
        known = [category for category in (classes.categories if classes else categories) if category.keypoints]
        orders = {category.label: _mirror_order(category, augment) for category in known}
        self.mirror_orders = {label: order for label, order in orders.items() if order is not None}
        self.unflipped: dict[int, str] = {}  # classes by label: images with points of these are not flipped
        flips = self.augment.enabled and self.augment.flip > 0
        if flips and any(task.learns_from == "labelled keypoint" for task in tasks):
            self.unflipped = {category.label: category.name for category in known if orders[category.label] is None}
            _check_pairs(augment, known)

    def target(self, target: Target) -> Target:
        """Return a target of the data set as the model knows it."""
        return target if self.classes is None else self.classes.to_model(target)

    def sample(
        self,
        target: Target,
        image: NDArray[np.uint8] | StoredImage,
        object_index: int | None,
        rng: np.random.Generator,
        task_rngs: Sequence[np.random.Generator],
        companions: Mapping[str, Sequence[Shown]] | None = None,
    ) -> Sample:
        """Make a sample of an image (H, W, 3), or of a crop around its object `object_index`.

        `rng` draws the augmentation, one of `task_rngs` the examples of each task and the augmentation of its
        `companions`. A task that the image has no annotations for, or that does not learn from it mirrored, gets no
        entry.
        """
        found, padding = contents(target), self.tasks[0].crop_padding
        if object_index is not None and padding is not None and not isinstance(image, StoredImage):
            target, image = crop_to_object(target, image, object_index, padding, with_masks=self.with_masks)
        affine, pixels = self._augmented(target, image, rng)
        return self._labelled(target, pixels, affine, task_rngs, found, companions or {})

    def _augmented(
        self, target: Target, image: NDArray[np.uint8] | StoredImage, rng: np.random.Generator
    ) -> tuple[Affine, NDArray[Any]]:
        """Draw the map of an image to the input, and return it with the mapped pixels or stored features."""
        if isinstance(image, StoredImage):
            return image.draw(rng)
        augment = self.augment if self._may_flip(target) else replace(self.augment, flip=0.0)
        affine = random_affine(image.shape[:2], self.size, augment, rng, scale_range=self.scale_range)
        return affine, augmented_pixels(image, affine, self.size, augment, rng)

    def _may_flip(self, target: Target) -> bool:
        """Whether left and right are known of all labelled keypoints."""
        if not self.unflipped:
            return True
        labelled = (target.keypoints[..., 2] > 0).any(axis=1)
        return not np.isin(target.labels[labelled], list(self.unflipped)).any()

    def _labelled(
        self,
        target: Target,
        pixels: NDArray[Any],
        affine: Affine,
        task_rngs: Sequence[np.random.Generator],
        found: Collection[str],
        companions: Mapping[str, Sequence[Shown]],
    ) -> Sample:
        moved = self._moved(target, affine)
        mirrored = affine.scale_x < 0
        examples: dict[str, list[Example]] = {}
        pixels_beside: dict[str, list[NDArray[Any]]] = {}
        for task, task_rng in zip(self.tasks, task_rngs, strict=True):
            if task.learns_from not in found or (mirrored and not task.flips):
                continue
            own = task.after_flip(moved) if mirrored else moved
            if beside := companions.get(task.name):
                maps, pixels_beside[task.name] = zip(
                    *(self._augmented(other, image, task_rng) for other, image in beside), strict=True
                )
                others = (self._moved(other, each) for (other, _), each in zip(beside, maps, strict=True))
                own = replace(own, companions=tuple(others))
            examples[task.name] = _examples(task, own, self.size, task_rng)
        return Sample(pixels, examples, target.image.id, pixels_beside)

    def _moved(self, target: Target, affine: Affine) -> Target:
        return transform_target(
            target,
            affine,
            self.size,
            min_visible=self.augment.min_visible,
            mirror_orders=self.mirror_orders,
            with_masks=self.with_masks,
        )


def _examples(task: ExampleMaker, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
    """Return a task's examples of a target, each with what it was made from."""
    examples = task.examples(target, size, rng)
    return [example if example.target is not None else replace(example, target=target) for example in examples]


def _mirror_order(category: Category, augment: AugmentConfig) -> NDArray[np.int64] | None:
    """Return the order of mirrored keypoints, by the settings, the data set or the names; None if none says it."""
    given = augment.flip_pairs
    own = [pair for pair in given or () if (find_points(pair, category.keypoints) >= 0).any()]
    try:
        return mirror_order(category.keypoints, own if own or given == () else category.flip_pairs)
    except ValueError as error:
        raise InputError(f"flip_pairs of {category.name!r} cannot be used: {error}") from None


def _check_pairs(augment: AugmentConfig, categories: Sequence[Category]) -> None:
    for pair in augment.flip_pairs or ():
        if not any((find_points(pair, category.keypoints) >= 0).any() for category in categories):
            known = {name for category in categories for name in category.keypoints}
            raise unknown_name("keypoint in augment.flip_pairs:", pair[0], known)


def _common_scales(tasks: Sequence[ExampleMaker], augment: AugmentConfig) -> tuple[float, float]:
    lows, highs = zip(*(task.scale_range for task in tasks), strict=True)
    low = max(lows) if augment.scale_min is None else augment.scale_min
    high = min(highs) if augment.scale_max is None else augment.scale_max
    if augment.enabled and low > high:
        ranges = ", ".join(f"{task.name} {task.scale_range[0]:g} to {task.scale_range[1]:g}" for task in tasks)
        alone = len(tasks) == 1
        raise InputError(
            f"{'no scale is left' if alone else 'tasks that share images have no scale in common'}: {ranges}, from "
            f"{low:g} to {high:g} in all; set augment.scale_min and augment.scale_max"
            f"{'' if alone else ', or share_images=false'}"
        )
    return low, high


class _ImageReader:
    """Reads the images of samples. One that cannot be used is named in a warning and replaced by the next one."""

    def __init__(
        self,
        dataset: Dataset,
        index: NDArray[np.int32],
        max_bad_share: float,
        read_image: Callable[[ImageRecord], NDArray[np.uint8] | StoredImage] = read_record_image,
    ) -> None:
        self.dataset = dataset
        self.index = index
        self.max_bad_share = max_bad_share
        self.read_image = read_image
        self._tried = np.zeros(len(dataset), np.bool_)  # images that this process has read
        self._bad: dict[int, Defect] = {}  # those of them that cannot be used

    def read(self, number: int) -> tuple[Target, NDArray[np.uint8] | StoredImage, int | None]:
        """Return annotations, image and object of a sample, or of the next one that can be used."""
        for step in range(len(self.index)):
            image_index, object_index = self.index[(number + step) % len(self.index)].tolist()
            target = self.dataset.target(image_index)
            self._tried[image_index] = True
            try:
                image = self.read_image(target.image)
            except InputError as error:
                self._skip(image_index, target.image.id, str(error))
                continue
            return target, image, None if object_index == WHOLE_IMAGE else object_index
        raise InputError(f"{self.dataset.root} has no readable image; see pix2seq data check")

    def read_beside(self, companions: Sequence[Companion]) -> list[Shown]:
        """Return images with the one object that each is shown for. Those that cannot be used are left out."""
        found: list[Shown] = []
        for image_index, object_index in companions:
            target = self.dataset.target(image_index)
            self._tried[image_index] = True
            try:
                found.append((target.only(object_index), self.read_image(target.image)))
            except InputError as error:
                self._skip(image_index, target.image.id, str(error))
        return found

    def _skip(self, image_index: int, image_id: int, reason: str) -> None:
        if image_index in self._bad:
            return
        warnings.warn(f"skipped in training: {reason}", stacklevel=4)
        self._bad[image_index] = (image_id, None, reason, SKIPPED, "")
        num_tried = int(np.count_nonzero(self._tried))
        bad = list(self._bad.values())
        refuse_bad_share("images", bad, num_tried, where=self.dataset.root, max_bad_share=self.max_bad_share)


class _CompanionReader:
    """Draws and reads what tasks show beside an image."""

    def __init__(
        self, dataset: Dataset, tasks: Sequence[ExampleMaker], maker: SampleMaker, reader: _ImageReader
    ) -> None:
        self.tasks, self.maker, self.reader = tasks, maker, reader
        self.objects = ObjectsByClass(dataset) if any(task.shows_companions for task in tasks) else None

    def read(self, target: Target, task_rngs: Sequence[np.random.Generator]) -> dict[str, list[Shown]]:
        """Return the companions of an image by task; `target` has the data set's labels, they have the model's."""
        found: dict[str, list[Shown]] = {}
        for task, rng in zip(self.tasks, task_rngs, strict=True):
            if self.objects is not None and task.shows_companions:
                beside = self.reader.read_beside(task.companions(target, self.objects, rng))
                found[task.name] = [(self.maker.target(each), image) for each, image in beside]
        return found


class TrainingSet(torch.utils.data.Dataset[Sample]):
    """The samples of a data set in memory, by (epoch, index).

    Images and objects that the task cannot learn from are left out: `index` has an (image, object) per sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        task: ExampleMaker,
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        classes: ClassMap | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
        features: FeatureStore | None = None,
    ) -> None:
        """`classes` as in `SampleMaker`. At most `max_bad_share` (0 to 1) of the images may prove unusable.

        With `features`, samples have stored features in place of images.
        """
        self.dataset = dataset
        self.task = task
        self.seed = seed
        self.maker = SampleMaker(dataset.categories, [task], size=size, augment=augment, classes=classes)
        each_object = task.crop_padding is not None
        self.index = find_samples(dataset.annotations, task.learns_from, each_object=each_object)
        read_image = read_record_image if features is None else features.read
        self._reader = _ImageReader(dataset, self.index, max_bad_share, read_image)
        self._beside = _CompanionReader(dataset, [task], self.maker, self._reader)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that the samples are for."""
        return [self.task.name]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return sample `index` of `epoch`: key is (epoch, index).

        An image that cannot be read, or differs in size from its annotations, is named in a warning and
        replaced by the next one. Raises `BadShareError` if ten or more images, and more than
        `max_bad_share` of those that this process has read, were bad.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        target, image, object_index = self._reader.read(index)
        companions = self._beside.read(target, [rng])
        return self.maker.sample(self.maker.target(target), image, object_index, rng, [rng], companions)


class SharedTrainingSet(torch.utils.data.Dataset[Sample]):
    """The images of a data set by (epoch, index), each a sample for all of several tasks that it has annotations for.

    An image is read and augmented once. What is drawn for it, and what each task draws, depends on the image and not
    on which tasks share it, except that a task of keypoints forbids to flip those whose sides are not known.
    """

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[ExampleMaker],
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        classes: ClassMap | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:
        """Options as in `TrainingSet`. Raises `InputError` if the tasks have no scale in common."""
        if any(task.crop_padding is not None for task in tasks):
            raise ValueError("a task that crops around objects cannot share whole images")
        self.dataset = dataset
        self.seed = seed
        self.maker = SampleMaker(dataset.categories, tasks, size=size, augment=augment, classes=classes)
        rows = [find_samples(dataset.annotations, task.learns_from, each_object=False) for task in tasks]
        self.index = np.unique(np.concatenate(rows), axis=0)
        self._reader = _ImageReader(dataset, self.index, max_bad_share)
        self._beside = _CompanionReader(dataset, tasks, self.maker, self._reader)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that the samples are for."""
        return [task.name for task in self.maker.tasks]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return sample `index` of `epoch`: key is (epoch, index). Bad images are treated as in `TrainingSet`."""
        epoch, index = key
        words = (self.seed, epoch, int(self.index[index, 0]))  # the image's number, which no other task changes
        task_rngs = [np.random.default_rng((*words, zlib.crc32(name.encode()))) for name in self.tasks]
        target, image, _ = self._reader.read(index)
        companions = self._beside.read(target, task_rngs)
        rng = np.random.default_rng(words)
        return self.maker.sample(self.maker.target(target), image, None, rng, task_rngs, companions)


class TrainingStream:
    """The samples of a split in shards, one per image that the task can learn from.

    Their order is that of `ShardStream` and depends on the number of readers. A task that crops around
    objects gets one random object of each image per epoch.
    """

    def __init__(
        self,
        index: ShardIndex,
        task: ExampleMaker,
        *,
        size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        classes: ClassMap | None = None,
        mix: int = 4,
    ) -> None:
        """`classes` as in `SampleMaker`; each reader keeps `mix` shards in memory."""
        self.index = index
        self.task = task
        self.seed = seed
        self.mix = mix
        self.maker = SampleMaker(index.categories, [task], size=size, augment=augment, classes=classes)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that the samples are for."""
        return [self.task.name]

    def __len__(self) -> int:
        return self.index.num_with(self.task.learns_from)

    def read(self, reader: int, num_readers: int, *, start: int = 0) -> Iterator[Sample]:
        """Yield the endless samples of one of `num_readers` readers, from its sample `start` on.

        Raises `InputError`, also while reading, if there are too few shards, or missing or damaged ones.
        """
        stream = ShardStream(
            self.index,
            seed=self.seed,
            reader=reader,
            num_readers=num_readers,
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
            except InputError as error:  # it was readable when the shards were written
                name = f"{self.index.location}: {target.image.path}"
                raise InputError(f"{name}: {error}, and write the shards again") from None
            choices = self.task.samples(target)
            yield self.maker.sample(target, image, choices[int(rng.integers(len(choices)))], rng, [rng])
