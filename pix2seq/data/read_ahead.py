"""Read many image files in batches, while a model works on the batch before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.image import batch_by_pixels, image_size, read_image
from pix2seq.errors import InputError

NUM_READERS = 4  # threads

ReadImage: TypeAlias = tuple[int, NDArray[np.uint8] | InputError]
"""The position of a path, and the pixels (H, W, 3) of its image or why it cannot be read."""


def read_ahead(paths: Sequence[Path], batch_size: int) -> Iterator[list[ReadImage]]:
    """Yield all images in order, in batches that fit in memory; the next batch is read meanwhile."""

    def read(position: int) -> ReadImage:
        try:
            return position, read_image(paths[position])
        except InputError as error:
            return position, error

    with ThreadPoolExecutor(NUM_READERS) as pool:
        ahead: list[Future[ReadImage]] = []
        for some in _batches(paths, batch_size):
            ready, ahead = ahead, [pool.submit(read, position) for position in some]
            if ready:
                yield [future.result() for future in ready]
        if ahead:
            yield [future.result() for future in ahead]


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
