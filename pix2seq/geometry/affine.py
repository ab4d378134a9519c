"""One affine map from source pixels to output pixels, for images, boxes, polygons and keypoints alike.

Crop, resize and mirror all have the form x' = scale * x + offset on each axis, so the same numbers
move an image and its labels. `pix2seq.data.image.warp_image` applies a map to an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Affine:
    """x' = scale_x * x + offset_x, y' = scale_y * y + offset_y; a negative `scale_x` mirrors."""

    scale_x: float
    scale_y: float
    offset_x: float = 0.0
    offset_y: float = 0.0

    def points(self, xy: NDArray[np.floating]) -> NDArray[np.float32]:
        """Map points (..., 2) as x, y."""
        return (xy * [self.scale_x, self.scale_y] + [self.offset_x, self.offset_y]).astype(np.float32)

    def boxes(self, xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """Map boxes (..., 4); a mirrored box keeps x0 < x1."""
        corners = self.points(xyxy.reshape(*xyxy.shape[:-1], 2, 2))
        return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)

    def inverse(self) -> Affine:
        """Return the map from output pixels to source pixels."""
        return Affine(1 / self.scale_x, 1 / self.scale_y, -self.offset_x / self.scale_x, -self.offset_y / self.scale_y)

    def then_mirror(self, width: float) -> Affine:
        """Return this map followed by a left-right flip of an output `width` pixels wide."""
        return Affine(-self.scale_x, self.scale_y, width - self.offset_x, self.offset_y)


def fit_affine(source: tuple[int, int], target: tuple[int, int]) -> Affine:
    """Resize a `source` (height, width) to fit into `target` with its aspect ratio; padding goes right and below.

    As in the official evaluation, the resized sides are rounded half to even, and each axis is
    scaled to its rounded side.
    """
    scale = min(target[0] / source[0], target[1] / source[1])
    height, width = (max(int(np.rint(np.float32(side) * np.float32(scale))), 1) for side in source)
    return Affine(width / source[1], height / source[0])
