"""Training augmentation: scale jitter, crop and flip as one affine map, and colour jitter.

`pix2seq.data.targets` moves annotations by these maps.

All random draws come from the generator that the caller passes, so a sample is a function of its seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.image import pad_image, visible_part
from pix2seq.errors import InputError
from pix2seq.geometry.affine import Affine, fit_affine
from pix2seq.settings import Range, Settings, Share

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import checks the network for a newer version
import albumentations as A

Scale = Annotated[float, Range(above=0, most=100)]
Change = Annotated[float, Range(least=0, most=100)]


@dataclass(frozen=True)
class AugmentConfig(Settings):
    """How training samples are augmented."""

    section = "augment"

    enabled: bool = True  # false: resize and pad as in evaluation
    scale_min: Scale | None = None  # the image is resized to between scale_min
    scale_max: Scale | None = None  # and scale_max of the training size, then cropped; if unset, the task's range
    flip: Share = 0.5  # probability of a left-right flip
    # Pairs of keypoints that swap in a flip, beside those whose names say it; [] if no others do.
    flip_pairs: tuple[tuple[str, str], ...] | None = None
    brightness: Change = 0.0  # largest relative change
    contrast: Change = 0.0  # largest relative change
    saturation: Change = 0.0  # largest relative change
    hue: Annotated[float, Range(least=0, most=0.5)] = 0.0  # largest shift, 0.5 is half the colour circle
    min_visible: Share = 0.0  # drop objects that keep less than this share of their box after the crop

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale_min, self.scale_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"augment.scale_min ({low}) must be at most augment.scale_max ({high})")

    def scales(self, allowed: tuple[float, float]) -> tuple[float, float]:
        """Return the smallest and the largest scale: those that are set, else what tasks have `allowed`.

        Raises `InputError` if there is none between them.
        """
        low = allowed[0] if self.scale_min is None else self.scale_min
        high = allowed[1] if self.scale_max is None else self.scale_max
        if low > high and self.enabled:
            raise InputError(f"no scale is left from {low:g} to {high:g}; set augment.scale_min and augment.scale_max")
        return low, high


def random_affine(
    source: tuple[int, int],
    target: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    scale_range: tuple[float, float] = (0.3, 2.0),
) -> Affine:
    """Draw scale jitter, crop and flip of a `source` (height, width) into `target`.

    As published, except that the crop draws its position on each axis independently. `scale_range` is
    used if `config` has no scales.
    """
    if not config.enabled:
        return fit_affine(source, target)
    jitter = rng.uniform(*config.scales(scale_range))
    scale = jitter * min(target[0] / source[0], target[1] / source[1])
    height, width = (max(int(side * scale), 1) for side in source)
    top = int(max(height - target[0], 0) * rng.random())
    left = int(max(width - target[1], 0) * rng.random())
    affine = Affine(width / source[1], height / source[0], -left, -top)
    if rng.random() < config.flip:
        # Mirror about the centre of the visible part, so that the image stays in the top left corner.
        affine = affine.then_mirror(min(width, target[1]))
    return affine


def augmented_pixels(
    image: NDArray[np.uint8],
    affine: Affine,
    size: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Resample an image (H, W, 3) into an output of `size` (height, width), and change its colours.

    As published, the padding keeps its grey, so that it is the same in training as in evaluation.
    """
    pixels, corner = visible_part(image, affine, size)
    return pad_image(color_jitter(pixels, config, rng), corner, size)


def color_jitter(image: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Randomly change brightness, contrast, saturation and hue of an image (H, W, 3)."""
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    if not config.enabled or not any(strengths) or not image.size:
        return image
    transform = _color_transform(*strengths)
    # Without a seed, albumentations gives every worker the same draws and repeats them each epoch.
    transform.set_random_seed(int(rng.integers(2**31)))
    return transform(image=image)["image"]


@lru_cache(maxsize=8)
def _color_transform(brightness: float, contrast: float, saturation: float, hue: float) -> A.Compose:
    jitter = A.ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=1.0)
    return A.Compose([jitter])
