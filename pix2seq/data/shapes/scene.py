"""Draw a random scene: one image and its exact annotations, a function of a random generator.

Figures are drawn from back to front on a grid SUPERSAMPLING times finer than the image. A map of the
owner of each fine pixel gives the visible masks, boxes, areas and keypoints exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pix2seq.data.shapes import person
from pix2seq.data.shapes.appearance import (
    HAIR,
    HSV_RANGES,
    SKIN,
    TEXTURES,
    blend,
    muted_colour,
    named_colour,
    second_tone,
    texture_weights,
)
from pix2seq.data.shapes.figures import POLYGONS, Ring, Window, bounds, fill, random_polygon
from pix2seq.geometry.polygons import ring_area

SUPERSAMPLING = 3  # fine pixels along the side of a pixel
MAX_FIGURES = 8
SIDES = (0.12, 0.5)  # range of a figure's longest side, as a share of the image's side
PERSON_SIDES = (0.3, 0.62)
EASY_SIDES = (0.25, 0.5)
MIN_VISIBLE = 0.35  # share of each figure that later figures must leave visible
MIN_PART = 2.0  # square pixels; smaller parts of a mask are dropped
TOLERANCE = 0.5  # fine pixels; straightens the stairs of a slanted edge and no more
CLASS_NAMES = (*POLYGONS, "person")
EASY_CLASS_NAMES = ("circle", "square", "triangle", "star", "heart")
COLOUR_NAMES = tuple(HSV_RANGES)
GROUNDS = {"plain": 0.2, "gradient": 0.25, "clouds": 0.3, "stripes": 0.1, "checks": 0.05, "noise": 0.1}  # their odds
# Stuff, from top to bottom, and the grounds that show it.
STUFF = {"sky": ("plain", "gradient", "clouds"), "ground": ("stripes", "checks", "noise")}
HORIZON = (0.25, 0.75)  # range of its height at either side, as a share of the image's


@dataclass
class Figure:
    """One object; coordinates in pixels, x right and y down."""

    name: str  # class
    colour: str  # a person's is that of the shirt
    texture: str
    box_xyxy: tuple[float, float, float, float] = (0, 0, 0, 0)  # of the visible part
    rings: list[Ring] = field(default_factory=list)  # polygons of the visible part
    area: float = 0.0  # of the visible part, square pixels
    keypoints: NDArray[np.float64] | None = None  # (17, 3) of a person: x, y, 0 outside, 1 hidden, 2 visible

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of the visible box."""
        x0, y0, x1, y1 = self.box_xyxy
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3), its figures, from back to front, and the stuff behind them."""

    image: NDArray[np.uint8]
    figures: list[Figure]
    stuff: list[Figure] = field(default_factory=list)  # without colour or texture, as if no figure stood before it


@dataclass
class _PlacedFigure:
    """A figure on the fine grid, without occlusion."""

    figure: Figure
    window: Window
    mask: NDArray[np.bool_]
    paints: list[tuple[Window, NDArray[np.bool_], str, tuple[int, ...]]]  # the parts of a person
    points: NDArray[np.float64] | None = None  # (17, 2) fine pixels
    faces_viewer: NDArray[np.bool_] | None = None
    num_visible: int = 0  # fine pixels that are not hidden

    def __post_init__(self) -> None:
        self.num_visible = int(np.count_nonzero(self.mask))


def make_scene(
    rng: Generator,
    size: int,
    max_figures: int = MAX_FIGURES,
    *,
    easy: bool = False,
    person_share: float | None = None,
    classes: Sequence[str] | None = None,
    stuff: bool = False,
) -> Scene:
    """Draw an image of `size` x `size` pixels with 1 to `max_figures` figures that may overlap.

    An `easy` scene has five classes, larger figures, no textures and a plain background. `person_share`, from 0 to 1,
    is the share of figures that are drawn as persons; by default all classes are as likely. `classes` names those that
    are drawn; with `person_share` it needs one beside the person. With `stuff`, a horizon parts `STUFF`.
    """
    names = tuple(classes or (EASY_CLASS_NAMES if easy else CLASS_NAMES))
    side = size * SUPERSAMPLING
    owner = np.zeros((side, side), np.int8)  # 0 is the background, i + 1 is figure i
    placed: list[_PlacedFigure] = []
    num_figures = int(rng.integers(1, max_figures + 1))
    for _ in range(num_figures):
        for _attempt in range(12):
            candidate = _random_figure(rng, side, names, easy, person_share)
            top, left, bottom, right = candidate.window
            below = owner[top:bottom, left:right]
            covered = np.bincount(below[candidate.mask], minlength=len(placed) + 1)
            if _fits(candidate, placed, covered):
                for other, lost in zip(placed, covered[1:], strict=True):
                    other.num_visible -= int(lost)
                placed.append(candidate)
                below[candidate.mask] = len(placed)
                break
    regions = _stuff(rng, size) if stuff else []
    fine = background(rng, size, easy) if not stuff else _landscape(rng, size, easy, regions)
    for candidate in placed:
        _paint(rng, fine, candidate)
    for number, candidate in enumerate(placed, start=1):
        _annotate(candidate, owner, number, side)
    image = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
    grain = rng.uniform(0, 4 if easy else 9)
    image = image.astype(np.float32) + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(grain)
    return Scene(image.clip(0, 255).astype(np.uint8), [candidate.figure for candidate in placed], regions)


def _random_figure(
    rng: Generator, side: int, names: tuple[str, ...], easy: bool, person_share: float | None
) -> _PlacedFigure:
    if person_share is not None:
        is_person = rng.random() < person_share
        names = ("person",) if is_person else tuple(name for name in names if name != "person")
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
        mask, points = fill(solid, window), pose.points * scale + centre
        return _PlacedFigure(figure, window, mask, paints, points, pose.faces_viewer)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    ring = random_polygon(name, rng) @ turn * scale + centre
    window = bounds([ring], side, side)
    return _PlacedFigure(figure, window, fill([ring], window), [])


def _fits(candidate: _PlacedFigure, placed: list[_PlacedFigure], covered: NDArray[np.int64]) -> bool:
    """Return whether enough of every figure stays visible; `covered` counts the fine pixels hidden, by owner."""
    if candidate.num_visible < (3 * SUPERSAMPLING) ** 2:
        return False
    return all(
        lost == 0 or other.num_visible - lost >= MIN_VISIBLE * np.count_nonzero(other.mask)
        for other, lost in zip(placed, covered[1:], strict=True)
    )


def _stuff(rng: Generator, size: int) -> list[Figure]:
    """Part an image by a slanted horizon."""
    left, right = (rng.uniform(*HORIZON, 2) * size).tolist()
    found = []
    for name, (edge, low, high) in zip(
        STUFF, ((0.0, 0.0, max(left, right)), (float(size), min(left, right), float(size))), strict=True
    ):
        ring = np.array([[0.0, edge], [size, edge], [size, right], [0.0, left]])
        found.append(Figure(name, "", "", (0.0, low, float(size), high), [ring], abs(ring_area(ring))))
    return found


def _landscape(rng: Generator, size: int, easy: bool, regions: Sequence[Figure]) -> NDArray[np.uint8]:
    """Draw regions of stuff that cover the image, each with one of its grounds."""
    whole = (0, 0, size * SUPERSAMPLING, size * SUPERSAMPLING)
    first, *others = regions
    fine = background(rng, size, easy, STUFF[first.name])
    for region in others:
        mask = fill([ring * SUPERSAMPLING for ring in region.rings], whole)
        fine[mask] = background(rng, size, easy, STUFF[region.name])[mask]
    return fine


def background(rng: Generator, size: int, easy: bool, kinds: Sequence[str] = tuple(GROUNDS)) -> NDArray[np.uint8]:
    """Draw a background of size * SUPERSAMPLING pixels a side; it has no edges, so it is drawn small and enlarged."""
    odds = np.array([GROUNDS[kind] for kind in kinds])
    kind = "plain" if easy else str(rng.choice(kinds, p=odds / odds.sum()))
    first, second = muted_colour(rng), muted_colour(rng)
    if kind in ("stripes", "checks", "noise"):
        second = first + (second - first) * np.float32(0.35)  # low contrast, so it stays a background
    share = texture_weights(kind, rng, (size, size), size * rng.uniform(0.06, 0.2))
    ground = blend(np.zeros((size, size), np.float32) if share is None else share, first, second)
    side = size * SUPERSAMPLING
    fine = np.asarray(cv2.resize(ground, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
    for _ in range(0 if easy else int(rng.integers(0, 4))):  # lines as distractors
        (x0, y0), (x1, y1) = rng.integers(0, side, (2, 2)).tolist()
        colour, width = muted_colour(rng).tolist(), int(rng.integers(1, 2 * SUPERSAMPLING))
        cv2.line(fine, (x0, y0), (x1, y1), colour, width, cv2.LINE_AA)
    return fine


def _paint(rng: Generator, fine: NDArray[np.uint8], candidate: _PlacedFigure) -> None:
    figure = candidate.figure
    colour = named_colour(figure.colour, rng)
    second = second_tone(figure.colour, colour, rng)
    top, left, bottom, right = candidate.window
    period = max((bottom - top + right - left) / 2 * rng.uniform(0.15, 0.35), 3.0 * SUPERSAMPLING)
    flat = {
        "skin": np.array(SKIN[int(rng.integers(len(SKIN)))], np.float32),
        "hair": np.array(HAIR[int(rng.integers(len(HAIR)))], np.float32),
        "ink": np.array((30, 24, 22), np.float32),
        "trousers": muted_colour(rng),
    }
    parts = [(window, mask, paint) for window, mask, paint, _ in candidate.paints]
    for (top, left, bottom, right), mask, paint in parts or [(candidate.window, candidate.mask, "all")]:
        if mask.size == 0:
            continue
        share = None if paint in flat else texture_weights(figure.texture, rng, mask.shape, period)
        ground = fine[top:bottom, left:right]
        ground[mask] = flat.get(paint, colour).astype(np.uint8) if share is None else blend(share[mask], colour, second)


def _annotate(candidate: _PlacedFigure, owner: NDArray[np.int8], number: int, side: int) -> None:
    """Fill in the annotations of the visible part of a figure."""
    top, left, bottom, right = candidate.window
    visible_mask = owner[top:bottom, left:right] == number
    fine_rings = mask_to_polygons(visible_mask, min_area=MIN_PART * SUPERSAMPLING**2)
    rings = [(ring + (left, top)) / SUPERSAMPLING for ring in fine_rings]
    figure = candidate.figure
    figure.rings = rings
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    figure.box_xyxy = (x0, y0, x1, y1)
    figure.area = float(sum(abs(ring_area(ring)) for ring in rings))
    if candidate.points is None or candidate.faces_viewer is None:
        return
    figure.keypoints = np.zeros((len(candidate.points), 3))
    for index, (x, y) in enumerate(candidate.points.tolist()):
        if not (0 <= x < side and 0 <= y < side):
            continue
        # A point is hidden by another figure, by a part of the person's own body in front of it, or on
        # the far side of the head.
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
        figure.keypoints[index] = (x / SUPERSAMPLING, y / SUPERSAMPLING, 2 if visible else 1)


def mask_to_polygons(mask: NDArray[np.bool_], *, min_area: float) -> list[Ring]:
    """Trace the outer rings of a mask (H, W), largest first, with pixel edges at whole numbers.

    COCO's polygons have no holes, so a mask with a hole is cut in two through the hole, and each side
    is traced. Parts and holes of less than `min_area` square pixels are left out.
    """
    rings: list[Ring] = []
    rest = [(mask, 0, 0)]
    while rest:
        piece, top, left = rest.pop()
        outer, holes = _trace(piece)
        holes = [hole for hole in holes if cv2.contourArea(hole.astype(np.float32)) >= min_area]
        if not holes:
            rings += [ring + (left, top) for ring in outer if cv2.contourArea(ring.astype(np.float32)) >= min_area]
            continue
        column, row = np.rint((holes[0].min(0) + holes[0].max(0)) / 2).astype(int)
        if np.count_nonzero(piece[:, column]) <= np.count_nonzero(piece[row]):
            rest += [(piece[:, :column], top, left), (piece[:, column:], top, left + int(column))]
        else:
            rest += [(piece[:row], top, left), (piece[row:], top + int(row), left)]
    return sorted(rings, key=lambda ring: -cv2.contourArea(ring.astype(np.float32)))


def _trace(mask: NDArray[np.bool_]) -> tuple[list[Ring], list[Ring]]:
    """Trace the outer rings and the holes of a mask (H, W).

    `cv2.findContours` runs through the centres of the outermost pixels, so it loses half a pixel on
    each side. Here it runs on a grid twice as fine, with the points in between set if the mean of the
    pixels around them is at least a half, so it passes midway between inside and outside: marching
    squares, without a bias on straight or slanted edges.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    across = padded[:, :-1] | padded[:, 1:]
    down = padded[:-1] | padded[1:]
    grid = np.empty((2 * height + 3, 2 * width + 3), np.uint8)
    grid[::2, ::2] = padded
    grid[::2, 1::2] = across
    grid[1::2, ::2] = down
    # Two or more of the four pixels are set: one in each column, or one in each row.
    grid[1::2, 1::2] = (down[:, :-1] & down[:, 1:]) | (across[:-1] & across[1:])
    contours, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer: list[Ring] = []
    holes: list[Ring] = []
    for index, contour in enumerate(contours):
        ring = cv2.approxPolyDP(contour, 2 * TOLERANCE, True)[:, 0]
        if len(ring) >= 3:
            (outer if hierarchy[0, index, 3] < 0 else holes).append(ring.astype(np.float64) / 2 - 0.5)
    return outer, holes
