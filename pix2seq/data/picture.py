"""The picture of an annotated image, in the frame that its annotations are in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.image import read_image
from pix2seq.data.target import ImageRecord
from pix2seq.errors import InputError


class SizeMismatchError(InputError):
    """A picture is not of the size that its annotations were made for."""


def read_picture(record: ImageRecord, content: bytes | None = None) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of exactly the size that `record` says, from its path or from encoded bytes.

    A picture that its EXIF orientation turns is upright; where only its stored sides are those of
    the annotations, their tool paid EXIF no heed, and the pixels come as they are stored. Any
    other size is refused, since nobody knows where the boxes lie then. Raises `InputError` as `read_image`.
    """
    source = record.path if content is None else content
    pixels = read_image(source)
    if pixels.shape[:2] != (record.height, record.width):
        upright, pixels = pixels, read_image(source, upright=False)
        if pixels.shape[:2] != (record.height, record.width):
            raise SizeMismatchError(
                f"{record.path} is {upright.shape[1]}x{upright.shape[0]}, the annotations say "
                f"{record.width}x{record.height}; put in the picture that was annotated"
            )
    return pixels
