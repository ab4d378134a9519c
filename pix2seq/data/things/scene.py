"""Compose a scene of cut-outs over a background, with exact annotations: a function of a random generator.

Cut-outs are pasted from back to front on a grid SUPERSAMPLING times finer than the image. A map of the owner of each
fine pixel gives the visible masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pix2seq.data.image import read_image
from pix2seq.data.shapes.figures import Ring
from pix2seq.data.shapes.scene import MIN_PART, MIN_VISIBLE, SUPERSAMPLING, background, mask_to_polygons
from pix2seq.data.things.cutouts import OPAQUE, fitted, read_cutout
from pix2seq.geometry.polygons import ring_area

SIDES = (0.15, 0.5)  # range of a thing's longer side, as a share of the image's side
MAX_TURN = np.pi / 6
MAX_SHEAR = 0.15
STRETCH = (0.85, 1.18)
GAIN = (0.75, 1.2)  # of the light on a thing
SLOPE = 0.25  # how much the light may differ from one side of a thing to the other, as a share
REPEAT_SHARE = 0.25  # of the things that have the name of one before
SHADOW_SHARE = 0.6  # of the things that cast a shadow
ATTEMPTS = 12  # to place a thing


@dataclass(frozen=True)
class PastedThing:
    """One object; coordinates in pixels, x right and y down, of the visible part."""

    name: str
    box_xyxy: tuple[float, float, float, float]
    rings: list[Ring]
    area: float  # square pixels


@dataclass
class _Placed:
    name: str
    pixels: NDArray[np.float32]  # (h, w, 4) light applied, alpha in [0, 1]
    left: int
    top: int
    num_pixels: int
    num_visible: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the fine grid."""
        height, width = self.pixels.shape[:2]
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Pixels (h, w) that belong to the thing."""
        return self.pixels[..., 3] >= OPAQUE / 255


def compose(
    rng: Generator,
    size: int,
    choices: Sequence[Sequence[str]],
    files: Mapping[str, Sequence[Path]],
    max_objects: int,
    backgrounds: Sequence[Path] = (),
) -> tuple[NDArray[np.uint8], list[PastedThing]]:
    """Compose an image (size, size, 3) with 1 to `max_objects` things that may overlap.

    Each of `choices` is a group of names, and all groups are as likely; `files` are the cut-outs of each name.
    """
    side = size * SUPERSAMPLING
    owner = np.zeros((side, side), np.int16)  # 0 is the background, i + 1 is thing i
    placed: list[_Placed] = []
    for _ in range(int(rng.integers(1, max_objects + 1))):
        for _attempt in range(ATTEMPTS):
            group = choices[int(rng.integers(len(choices)))]
            name = group[int(rng.integers(len(group)))]
            if placed and rng.random() < REPEAT_SHARE:
                name = placed[int(rng.integers(len(placed)))].name
            candidate = _place(rng, side, name, files[name])
            covered = np.bincount(owner[candidate.window][candidate.mask], minlength=len(placed) + 1)
            if candidate.num_pixels >= (3 * SUPERSAMPLING) ** 2 and all(
                lost == 0 or other.num_visible - lost >= MIN_VISIBLE * other.num_pixels
                for other, lost in zip(placed, covered[1:], strict=True)
            ):
                for other, lost in zip(placed, covered[1:], strict=True):
                    other.num_visible -= int(lost)
                placed.append(candidate)
                owner[candidate.window][candidate.mask] = len(placed)
                break
    fine = _photo(rng, side, backgrounds) if backgrounds else background(rng, size, False)
    canvas = fine.astype(np.float32)
    for each in placed:
        _paste(rng, canvas, each)
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 6))
    pasted = [_annotated(each, owner, number) for number, each in enumerate(placed, start=1)]
    return image.clip(0, 255).astype(np.uint8), [each for each in pasted if each is not None]


def _place(rng: Generator, side: int, name: str, files: Sequence[Path]) -> _Placed:
    """Draw a cut-out of a name, turned, stretched, sheared and lit, and its place, mostly inside the image."""
    low, high = SIDES
    length = side * low * (high / low) ** rng.random()  # small ones are as common as large ones
    cutout = fitted(read_cutout(files[int(rng.integers(len(files)))]), max(round(length), 1))
    height, width = cutout.shape[:2]
    scale = length / max(height, width)
    stretch = np.sqrt(rng.uniform(*STRETCH))
    turn, shear = rng.uniform(-MAX_TURN, MAX_TURN), rng.uniform(-MAX_SHEAR, MAX_SHEAR)
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.array([[c, -s], [s, c]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([scale * stretch, scale / stretch])
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) @ matrix.T
    start, (box_width, box_height) = corners.min(axis=0), np.ceil(np.ptp(corners, axis=0)).astype(int)
    # A pixel's centre is at half a pixel, where OpenCV has it at a whole one.
    offset = matrix @ (0.5, 0.5) - start - 0.5
    premultiplied = cutout.astype(np.float32) / 255
    premultiplied[..., :3] *= premultiplied[..., 3:]
    warped = cv2.warpAffine(
        premultiplied, np.column_stack([matrix, offset]), (int(box_width), int(box_height)), flags=cv2.INTER_LINEAR
    )
    alpha = warped[..., 3:]
    colours = np.where(alpha > 0, warped[..., :3] / np.maximum(alpha, 1e-6), 0) * 255
    pixels = np.concatenate([colours * _light(rng, warped.shape[:2])[..., None], alpha], axis=2).astype(np.float32)
    left, top = (round(rng.uniform(-0.2 * each, side - 0.8 * each)) for each in (box_width, box_height))
    inside = pixels[max(-top, 0) : side - top, max(-left, 0) : side - left]
    num_pixels = int(np.count_nonzero(inside[..., 3] >= OPAQUE / 255))
    return _Placed(name, inside, max(left, 0), max(top, 0), num_pixels, num_pixels)


def _light(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Draw the light on each pixel (h, w): a gain that rises from one side to the other."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    slope = rng.uniform(0, SLOPE) * (np.cos(angle) * x + np.sin(angle) * y)
    return (rng.uniform(*GAIN) * (1 + slope)).astype(np.float32)


def _paste(rng: Generator, canvas: NDArray[np.float32], thing: _Placed) -> None:
    """Blend a thing, maybe with its shadow, into the canvas (S, S, 3)."""
    rows, columns = thing.window
    if rng.random() < SHADOW_SHARE:
        full = np.zeros(canvas.shape[:2], np.float32)
        full[rows, columns] = thing.pixels[..., 3]
        length = max(thing.pixels.shape[:2])
        shift = rng.uniform(0.02, 0.1, 2) * length * (rng.choice([-1, 1]), 1)
        moved = cv2.warpAffine(full, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), full.shape[::-1])
        soft = cv2.GaussianBlur(moved, (0, 0), max(0.04 * length, 1.0))
        canvas *= 1 - np.float32(rng.uniform(0.2, 0.5)) * soft[..., None]
    alpha = thing.pixels[..., 3:]
    canvas[rows, columns] += alpha * (thing.pixels[..., :3] - canvas[rows, columns])


def _annotated(thing: _Placed, owner: NDArray[np.int16], number: int) -> PastedThing | None:
    """Trace the visible part of a thing; None if it is too thin to be traced."""
    fine_rings = mask_to_polygons(owner[thing.window] == number, min_area=MIN_PART * SUPERSAMPLING**2)
    if not fine_rings:
        return None
    rings = [(ring + (thing.left, thing.top)) / SUPERSAMPLING for ring in fine_rings]
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return PastedThing(thing.name, (x0, y0, x1, y1), rings, float(sum(abs(ring_area(ring)) for ring in rings)))


def _photo(rng: Generator, side: int, backgrounds: Sequence[Path]) -> NDArray[np.uint8]:
    """Cut a random square out of a random background and bring it to `side` pixels."""
    pixels = read_image(backgrounds[int(rng.integers(len(backgrounds)))])
    shorter = min(pixels.shape[:2])
    length = max(int(shorter * rng.uniform(0.5, 1.0)), 1)
    top, left = (int(rng.integers(0, extent - length + 1)) for extent in pixels.shape[:2])
    square = pixels[top : top + length, left : left + length]
    return np.asarray(cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
