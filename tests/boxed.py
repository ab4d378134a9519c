"""Annotated images of boxes alone, without files."""

import numpy as np

from pix2seq.types import ImageRecord, Target


def boxed_target(boxes, labels, size, *, image_id, crowd=()):
    """The target of an image of `size` (width, height); `crowd` are the numbers of objects that are crowds."""
    number = len(labels)
    return Target(
        ImageRecord(image_id, "x.jpg", *size),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.full(number, 400, np.float32),
        np.isin(np.arange(number), crowd),
        np.arange(number) + 10 * image_id,
        (None,) * number,
        np.zeros((number, 0, 3), np.float32),
    )
