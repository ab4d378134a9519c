"""From shards to training samples, each a function of (seed, epoch, number of the picture)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from pix2seq.data.picture import read_picture
from pix2seq.data.shards import ShardIndex, ShardStream
from pix2seq.data.training_set import ExampleMaker, SampleMaker
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.tasks.example import Sample


class TrainingStream:
    """The samples of a split in shards, one for each picture that the task can learn from.

    They come in the order of `ShardStream`, which depends on how many readers there are. Where every object
    is a picture of its own, one of them is drawn each epoch.
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
                image = read_picture(target.image, shard_sample.image)
            except InputError as error:  # it could be read when the shards were written
                name = f"{self.index.location}: {target.image.path}"
                raise InputError(f"{name}: {error}, and write the shards anew") from None
            places = self.task.places(target)
            yield self.maker.sample(target, image, places[int(rng.integers(len(places)))], rng)
