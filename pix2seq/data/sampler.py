"""The order of training samples: an endless, seeded stream of (epoch, index), cut into batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from pix2seq.errors import InputError


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index); each epoch is a new permutation that depends only on (seed, epoch).

    The stream is endless and a batch may span two epochs, so no image is left out or padded.
    `start` skips that many batches at no cost: a resumed run gets the batches it would have got. Only
    `part` of each batch is returned.
    """

    def __init__(
        self, num_images: int, batch_size: int, *, seed: int, start: int = 0, part: slice = slice(None)
    ) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; expected at least 1")
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.part = part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start * self.batch_size
        epoch, offset = divmod(position, self.num_images)
        order = self._order(epoch)
        while True:
            batch: list[tuple[int, int]] = []
            while len(batch) < self.batch_size:
                if offset == self.num_images:
                    epoch, offset = epoch + 1, 0
                    order = self._order(epoch)
                batch.append((epoch, int(order[offset])))
                offset += 1
            yield batch[self.part]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_images)


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the part of each batch for one of `world_size` processes: contiguous, and as even as possible.

    Raises `InputError` if there are more processes than images in a batch.
    """
    if world_size > batch_size:
        raise InputError(
            f"{world_size} processes are too many for {batch_size} images at a time (batch_size / accumulate); "
            "start fewer, raise batch_size, or lower accumulate"
        )
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
