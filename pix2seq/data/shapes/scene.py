"""One image and everything that is true of it, a function of a random generator.

Figures are drawn from back to front on a grid FINE times finer than the image. A map of which
figure owns each fine pixel gives masks, boxes, areas and hidden keypoints exactly as they are seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pix2seq.data.shapes import colours, person
from pix2seq.data.shapes.figures import OUTLINES, outline
from pix2seq.data.shapes.raster import Ring, bounds, fill
from pix2seq.data.shapes.textures import TEXTURES, blend, weights
from pix2seq.data.shapes.visible import mask_rings, ring_area

FINE = 3  # fine pixels along a pixel's side
MAX_FIGURES = 8
SIDES = (0.12, 0.5)  # longest side of a figure, as a share of the image's
PERSON_SIDES = (0.3, 0.62)
EASY_SIDES = (0.25, 0.5)
MIN_VISIBLE = 0.35  # a figure that would leave less than this of another in sight is put elsewhere
MIN_PART = 2.0  # square pixels; smaller scraps of a mask are no part of it
CLASS_NAMES = (*OUTLINES, "person")
EASY_CLASS_NAMES = ("circle", "square", "triangle", "star", "heart")
COLOUR_NAMES = tuple(colours.HSV_RANGES)

Window = tuple[int, int, int, int]


@dataclass
class Figure:
    """One object. Coordinates in pixels, x right and y down."""

    name: str  # class
    colour: str  # of a person, the shirt's
    texture: str
    box_xyxy: tuple[float, float, float, float] = (0, 0, 0, 0)  # of what is visible
    rings: list[Ring] = field(default_factory=list)  # outlines of what is visible
    area: float = 0.0  # visible, square pixels
    keypoints: NDArray[np.float64] | None = None  # (17, 3) of a person: x, y, 0 outside, 1 hidden, 2 seen

    @property
    def centre(self) -> tuple[float, float]:
        """Of the visible box."""
        x0, y0, x1, y1 = self.box_xyxy
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) and its figures, from back to front."""

    image: NDArray[np.uint8]
    figures: list[Figure]


@dataclass
class _Placed:
    """A figure on the fine grid, before anything hides it."""

    figure: Figure
    window: Window
    mask: NDArray[np.bool_]
    paints: list[tuple[Window, NDArray[np.bool_], str, tuple[int, ...]]]  # of a person: where each piece lies
    points: NDArray[np.float64] | None = None  # (17, 2) fine pixels
    faces_viewer: NDArray[np.bool_] | None = None
    num_seen: int = 0  # fine pixels that nothing hides

    def __post_init__(self) -> None:
        self.num_seen = int(np.count_nonzero(self.mask))


def make_scene(rng: Generator, size: int, max_figures: int = MAX_FIGURES, *, easy: bool = False) -> Scene:
    """An image of `size` x `size` pixels with 1 to `max_figures` figures that may overlap.

    An `easy` one has five classes, larger figures, no textures and nothing else in it.
    """
    side = size * FINE
    owner = np.zeros((side, side), np.int8)  # 0 is background, figure i is i + 1
    placed: list[_Placed] = []
    wanted = int(rng.integers(1, max_figures + 1))
    for _ in range(wanted):
        for _attempt in range(12):
            candidate = _place(rng, side, easy)
            top, left, bottom, right = candidate.window
            below = owner[top:bottom, left:right]
            covered = np.bincount(below[candidate.mask], minlength=len(placed) + 1)
            if _fits(candidate, placed, covered):
                for other, lost in zip(placed, covered[1:], strict=True):
                    other.num_seen -= int(lost)
                placed.append(candidate)
                below[candidate.mask] = len(placed)
                break
    fine = _background(rng, size, easy)
    for candidate in placed:
        _paint(rng, fine, candidate)
    for number, candidate in enumerate(placed, start=1):
        _describe(candidate, owner, number, side)
    image = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
    grain = rng.uniform(0, 4 if easy else 9)
    image = image.astype(np.float32) + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(grain)
    return Scene(image.clip(0, 255).astype(np.uint8), [candidate.figure for candidate in placed])


def _place(rng: Generator, side: int, easy: bool) -> _Placed:
    names = EASY_CLASS_NAMES if easy else CLASS_NAMES
    name = names[int(rng.integers(len(names)))]
    texture = "plain" if easy or rng.random() < 0.4 else list(TEXTURES)[int(rng.integers(len(TEXTURES)))]
    figure = Figure(name, COLOUR_NAMES[int(rng.integers(len(COLOUR_NAMES)))], texture)
    low, high = EASY_SIDES if easy else PERSON_SIDES if name == "person" else SIDES
    scale = side * low * (high / low) ** rng.random()  # small figures are as common as large ones
    margin = scale / 2.5
    centre = rng.uniform(margin, side - margin, 2)
    if name == "person":
        pose = person.pose(rng)
        paints = []
        for part in pose.parts:
            rings = [ring * scale + centre for ring in part.rings]
            window = bounds(rings, side, side)
            paints.append((window, fill(rings, window), part.paint, part.points if part.solid else ()))
        solid = [ring * scale + centre for part in pose.parts if part.solid for ring in part.rings]
        window = bounds(solid, side, side)
        return _Placed(figure, window, fill(solid, window), paints, pose.points * scale + centre, pose.faces_viewer)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    ring = outline(name, rng) @ turn * scale + centre
    window = bounds([ring], side, side)
    return _Placed(figure, window, fill([ring], window), [])


def _fits(candidate: _Placed, placed: list[_Placed], covered: NDArray[np.int64]) -> bool:
    """Whether enough of every figure would still be seen; `covered` counts fine pixels lost, by owner."""
    if candidate.num_seen < (3 * FINE) ** 2:
        return False
    return all(
        lost == 0 or other.num_seen - lost >= MIN_VISIBLE * np.count_nonzero(other.mask)
        for other, lost in zip(placed, covered[1:], strict=True)
    )


def _background(rng: Generator, size: int, easy: bool) -> NDArray[np.uint8]:
    """The ground (size * FINE) pixels a side; it has no edges that would need the fine grid to begin with."""
    kinds, odds = ("plain", "gradient", "clouds", "stripes", "checks", "noise"), (0.2, 0.25, 0.3, 0.1, 0.05, 0.1)
    kind = "plain" if easy else str(rng.choice(kinds, p=odds))
    first, second = colours.muted(rng), colours.muted(rng)
    if kind in ("stripes", "checks", "noise"):
        second = first + (second - first) * np.float32(0.35)  # busy, yet a background
    share = weights(kind, rng, (size, size), size * rng.uniform(0.06, 0.2))
    ground = blend(np.zeros((size, size), np.float32) if share is None else share, first, second)
    fine = np.asarray(cv2.resize(ground, (size * FINE, size * FINE), interpolation=cv2.INTER_LINEAR), np.uint8)
    for _ in range(0 if easy else int(rng.integers(0, 4))):  # lines that are no objects
        (x0, y0), (x1, y1) = rng.integers(0, size * FINE, (2, 2)).tolist()
        cv2.line(fine, (x0, y0), (x1, y1), colours.muted(rng).tolist(), int(rng.integers(1, 2 * FINE)), cv2.LINE_AA)
    return fine


def _paint(rng: Generator, fine: NDArray[np.uint8], candidate: _Placed) -> None:
    figure = candidate.figure
    colour = colours.named(figure.colour, rng)
    second = colours.second_tone(figure.colour, colour, rng)
    top, left, bottom, right = candidate.window
    period = max((bottom - top + right - left) / 2 * rng.uniform(0.15, 0.35), 3.0 * FINE)
    flat = {
        "skin": np.array(colours.SKIN[int(rng.integers(len(colours.SKIN)))], np.float32),
        "hair": np.array(colours.HAIR[int(rng.integers(len(colours.HAIR)))], np.float32),
        "ink": np.array((30, 24, 22), np.float32),
        "trousers": colours.muted(rng),
    }
    pieces = [(window, mask, paint) for window, mask, paint, _ in candidate.paints]
    for (top, left, bottom, right), mask, paint in pieces or [(candidate.window, candidate.mask, "all")]:
        if mask.size == 0:
            continue
        share = None if paint in flat else weights(figure.texture, rng, mask.shape, period)
        ground = fine[top:bottom, left:right]
        ground[mask] = flat.get(paint, colour).astype(np.uint8) if share is None else blend(share[mask], colour, second)


def _describe(candidate: _Placed, owner: NDArray[np.int8], number: int, side: int) -> None:
    """Fill in what is visible of a figure."""
    top, left, bottom, right = candidate.window
    seen = owner[top:bottom, left:right] == number
    rings = [(ring + (left, top)) / FINE for ring in mask_rings(seen, min_area=MIN_PART * FINE**2)]
    figure = candidate.figure
    figure.rings = rings
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    figure.box_xyxy = (x0, y0, x1, y1)
    figure.area = float(sum(ring_area(ring) for ring in rings))
    if candidate.points is None or candidate.faces_viewer is None:
        return
    figure.keypoints = np.zeros((len(candidate.points), 3))
    for index, (x, y) in enumerate(candidate.points.tolist()):
        if not (0 <= x < side and 0 <= y < side):
            continue
        # Hidden by another figure, by a piece of the person's own body that lies before it, or on the
        # far side of the head.
        column, row = int(x), int(y)
        on_top = [
            points
            for (first_row, first_column, last_row, last_column), mask, _, points in candidate.paints
            if points
            and first_row <= row < last_row
            and first_column <= column < last_column
            and mask[row - first_row, column - first_column]
        ]
        shown = owner[row, column] == number and bool(on_top) and index in on_top[-1]
        visible = shown and bool(candidate.faces_viewer[index])
        figure.keypoints[index] = (x / FINE, y / FINE, 2 if visible else 1)
