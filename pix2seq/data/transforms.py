"""Training augmentation: scale jitter, crop and flip as one affine map, and colour.

Every draw comes from the generator that is passed in, so a sample is a function of its seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pix2seq.affine import Affine, fit_affine
from pix2seq.box_ops import box_area, clip_boxes_xyxy
from pix2seq.data.target import Segmentation, Target

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer version
import albumentations as A


@dataclass(frozen=True)
class AugmentConfig:
    """How training samples differ from the pictures they come from."""

    enabled: bool = True  # false: resize and pad as in evaluation
    scale_min: float = 0.3  # the picture is resized to between scale_min
    scale_max: float = 2.0  # and scale_max of the training size, then cropped
    flip: float = 0.5  # probability of a left-right flip
    brightness: float = 0.0  # largest relative change
    contrast: float = 0.0  # largest relative change
    saturation: float = 0.0  # largest relative change
    hue: float = 0.0  # largest turn, 0.5 is half the circle
    min_visible: float = 0.0  # an object that keeps less than this share of its box after the crop is left out

    def __post_init__(self) -> None:
        if not 0 < self.scale_min <= self.scale_max:
            raise ValueError(
                f"augment.scale_min ({self.scale_min}) must be positive and at most scale_max ({self.scale_max})"
            )


def random_affine(
    source: tuple[int, int], target: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> Affine:
    """Scale jitter, crop and flip of a `source` (height, width) into `target`.

    As published, except that the crop draws its place on each axis independently.
    """
    if not config.enabled:
        return fit_affine(source, target)
    jitter = rng.uniform(config.scale_min, config.scale_max)
    scale = jitter * min(target[0] / source[0], target[1] / source[1])
    height, width = (max(int(side * scale), 1) for side in source)
    top = int(max(height - target[0], 0) * rng.random())
    left = int(max(width - target[1], 0) * rng.random())
    affine = Affine(width / source[1], height / source[0], -left, -top)
    if rng.random() < config.flip:
        # Mirrored about what is visible, so that the picture stays in the top left corner.
        affine = affine.then_mirror(min(width, target[1]))
    return affine


def transform_target(
    target: Target,
    affine: Affine,
    size: tuple[int, int],
    *,
    min_visible: float = 0.0,
    mirror_order: NDArray[np.int64] | None = None,
) -> Target:
    """The target in pixels of an output of `size` (height, width).

    Boxes are clipped to the output, and objects without any area left there, or with less than
    `min_visible` of it, are dropped. Keypoints outside become unlabelled (0, 0, 0); where the map
    mirrors, `mirror_order` (K,) puts left and right back under their names.
    """
    height, width = size
    moved = affine.boxes(target.boxes_xyxy)
    boxes = clip_boxes_xyxy(moved, width, height)
    area = np.maximum(box_area(boxes), 0)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (area >= min_visible * box_area(moved))

    keypoints = target.keypoints.copy()
    if affine.scale_x < 0 and mirror_order is not None and keypoints.shape[1] == len(mirror_order):
        keypoints = keypoints[:, mirror_order]
    keypoints[..., :2] = affine.points(keypoints[..., :2])
    inside = ((keypoints[..., :2] >= 0) & (keypoints[..., :2] <= [width, height])).all(axis=-1)
    keypoints[~inside | (keypoints[..., 2] == 0)] = 0

    return replace(
        target,
        boxes_xyxy=boxes[keep],
        labels=target.labels[keep],
        areas=(target.areas * abs(affine.scale_x * affine.scale_y))[keep].astype(np.float32),
        iscrowd=target.iscrowd[keep],
        annotation_ids=target.annotation_ids[keep],
        segmentations=tuple(
            _transform_segmentation(s, affine) for s, kept in zip(target.segmentations, keep, strict=True) if kept
        ),
        keypoints=keypoints[keep],
    )


def _transform_segmentation(segmentation: Segmentation | None, affine: Affine) -> Segmentation | None:
    if isinstance(segmentation, dict):
        return None  # run lengths describe source pixels; crowds, the only ones that have them, are not trained on
    return segmentation and [affine.points(ring) for ring in segmentation]


def color_jitter(image: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random brightness, contrast, saturation and hue of a picture (H, W, 3)."""
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    if not config.enabled or not any(strengths):
        return image
    transform = _color_transform(*strengths)
    # albumentations gives every worker the same draws and repeats them each epoch unless told.
    transform.set_random_seed(int(rng.integers(2**31)))
    return transform(image=image)["image"]


@lru_cache(maxsize=8)
def _color_transform(brightness: float, contrast: float, saturation: float, hue: float) -> A.Compose:
    jitter = A.ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=1.0)
    return A.Compose([jitter])
