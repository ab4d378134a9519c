"""Read many image files in batches, while a model works on the batch before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.image import batch_by_pixels, image_size, read_image
from pix2seq.errors import InputError

NUM_READERS = 4  # threads

ReadImage: TypeAlias = tuple[int, NDArray[np.uint8] | InputError]
"""The number of an image, and its pixels (H, W, 3) or why it cannot be read."""


def read_ahead(paths: Sequence[Path], batch_size: int) -> Iterator[list[ReadImage]]:
    """Yield all images in order, in batches that fit in memory; the next batch is read meanwhile."""
    return read_batches_ahead(_batches(paths, batch_size), lambda position: read_image(paths[position]), ahead=1)


def read_batches_ahead(
    batches: Iterable[Sequence[int]], read: Callable[[int], NDArray[np.uint8]], *, ahead: int
) -> Iterator[list[ReadImage]]:
    """Yield the images of each batch of numbers, as `read` gives them, while the next `ahead` batches are read."""

    def attempt(number: int) -> ReadImage:
        try:
            return number, read(number)
        except InputError as error:
            return number, error

    waiting: deque[list[Future[ReadImage]]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for some in chain(batches, [()] * ahead):
            waiting.append([pool.submit(attempt, number) for number in some])
            if len(waiting) > ahead and (ready := waiting.popleft()):
                yield [future.result() for future in ready]


def _batches(paths: Sequence[Path], batch_size: int) -> Iterator[range]:
    """Yield the positions of images to be held in memory side by side."""
    for start in range(0, len(paths), batch_size):
        sizes = [_size(path) for path in paths[start : start + batch_size]]
        for part in batch_by_pixels(sizes, batch_size):
            yield range(start + part.start, start + part.stop)


def _size(path: Path) -> tuple[int, int]:
    """Return width and height of an image; of one that cannot be read nothing, because reading it says why."""
    try:
        return image_size(path)
    except InputError:
        return 0, 0
