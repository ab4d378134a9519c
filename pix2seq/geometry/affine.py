"""One map from source pixels to output pixels, applied to images, boxes, polygons and keypoints alike.

Crop, resize and mirror are all of the form x' = scale * x + offset on each axis, so whatever moves
the image moves its labels by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

PAD_VALUE = 0.3  # grey level around images that do not fill the output, as published


@dataclass(frozen=True)
class Affine:
    """x' = scale_x * x + offset_x, y' = scale_y * y + offset_y; a negative `scale_x` mirrors."""

    scale_x: float
    scale_y: float
    offset_x: float = 0.0
    offset_y: float = 0.0

    def points(self, xy: NDArray[np.floating]) -> NDArray[np.float32]:
        """Points (..., 2) as x, y."""
        return (xy * [self.scale_x, self.scale_y] + [self.offset_x, self.offset_y]).astype(np.float32)

    def boxes(self, xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """Boxes (..., 4); corners come back ordered."""
        corners = self.points(xyxy.reshape(*xyxy.shape[:-1], 2, 2))
        return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)

    def inverse(self) -> Affine:
        """The map from output pixels back to source pixels."""
        return Affine(1 / self.scale_x, 1 / self.scale_y, -self.offset_x / self.scale_x, -self.offset_y / self.scale_y)

    def then_mirror(self, width: float) -> Affine:
        """This map, followed by a left-right flip of an output `width` pixels wide."""
        return Affine(-self.scale_x, self.scale_y, width - self.offset_x, self.offset_y)

    def image(self, image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Resample an image (H, W, 3) into an output of `size` (height, width).

        Bilinear with antialiasing, only over the part that is visible; the rest is grey.
        """
        height, width = size
        x0, y0, x1, y1 = self.boxes(np.array([0.0, 0.0, image.shape[1], image.shape[0]]))
        left, top = max(round(float(x0)), 0), max(round(float(y0)), 0)
        right, bottom = min(round(float(x1)), width), min(round(float(y1)), height)
        out = np.full((height, width, 3), round(PAD_VALUE * 255), np.uint8)
        if right <= left or bottom <= top:
            return out
        region = self.inverse().boxes(np.array([left, top, right, bottom], np.float64))
        limits = np.array([image.shape[1], image.shape[0]] * 2, np.float32)
        part = Image.fromarray(image).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR, box=tuple(np.clip(region, 0, limits).tolist())
        )
        pixels = np.asarray(part)
        # NumPy takes ten times as long to copy pixels of three bytes in reverse.
        out[top:bottom, left:right] = cv2.flip(pixels, 1) if self.scale_x < 0 else pixels
        return out


def fit_affine(source: tuple[int, int], target: tuple[int, int]) -> Affine:
    """Resize a `source` (height, width) to fit into `target`, keeping its shape; padding goes right and below.

    As in the official evaluation, the resized sides are rounded half to even, and each axis is
    scaled by what its rounded side comes to.
    """
    scale = min(target[0] / source[0], target[1] / source[1])
    height, width = (max(int(np.rint(np.float32(side) * np.float32(scale))), 1) for side in source)
    return Affine(width / source[1], height / source[0])
