"""Simulated clicks on annotated objects: what is meant, where it is clicked, and what was answered before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.boxes import intersects_xyxy
from pix2seq.geometry.clicks import Click, Mask, disturb, first_click, mask_iou, next_click
from pix2seq.geometry.polygons import mask_to_rings, rasterize
from pix2seq.tasks.outlines import Ring, bounds, in_input
from pix2seq.tasks.request import Frame
from pix2seq.types import Target

CANVAS = 80  # side of the masks in which clicks are simulated
SURROUNDINGS = 0.6  # share of an object's size that these show on each side
STRANGER_SHARE = 0.2  # of the earlier answers, and of those to rate, that are another object altogether


@dataclass(frozen=True)
class Scene:
    """An object and its neighbours as masks (CANVAS, CANVAS) of a frame around it."""

    frame: Frame  # in pixels of the input
    truth: Mask
    others: list[Mask]  # that could be meant as well, where they are in the frame

    @classmethod
    def around(cls, rings: Sequence[Ring], others: Sequence[Sequence[Ring]], whole: Frame) -> Scene:
        """Draw an object and others, rings in pixels of the input that `whole` covers."""
        frame = whole.around(bounds(rings), SURROUNDINGS)
        drawn = [_draw(each, frame) for each in others]
        return cls(frame, _draw(rings, frame), [mask for mask in drawn if mask.any()])

    def point(self, click: Click) -> NDArray[np.float64]:
        """Return x, y (2,) of a click in pixels of the input."""
        return self.frame.origin + np.array([click.x, click.y]) / CANVAS * self.frame.size

    def rings(self, mask: Mask) -> list[Ring]:
        """Return the outline of a mask in pixels of the input."""
        return [self.frame.origin + ring / CANVAS * self.frame.size for ring in mask_to_rings(mask)]


@dataclass(frozen=True)
class Lesson:
    """An object that is meant, and clicks on it, in pixels of the input."""

    rings: list[Ring]
    points_xy: NDArray[np.float64]  # (N, 2)
    positive: NDArray[np.bool_]  # (N,)
    previous: list[Ring]  # the answer to all clicks but the last; none before the first
    quality: float  # IoU of the model's answer to these clicks; 1 where it is not known
    answer: list[Ring]  # an answer to rate, none to rate nothing
    answer_quality: float  # its IoU

    @property
    def box_xyxy(self) -> NDArray[np.float64]:
        """The box (4,) around the object."""
        return bounds(self.rings)


def other_meaning(
    rings: list[Ring],
    neighbours: Sequence[list[Ring]],
    whole: Frame,
    rng: np.random.Generator,
    *,
    part_share: float,
    group_share: float,
) -> list[Ring]:
    """Return what else a click on an object can mean: one of its parts, or all that touches it; mostly itself."""
    draw = rng.random()
    if draw < part_share and len(rings) > 1:
        return [rings[int(rng.integers(len(rings)))]]
    if not part_share <= draw < part_share + group_share or not neighbours:
        return rings
    scene = Scene.around([*rings, *(ring for each in neighbours for ring in each)], [rings, *neighbours], whole)
    kernel = np.ones((3, 3), np.uint8)
    own = cv2.dilate(scene.others[0].astype(np.uint8), kernel)
    touching = [mask for mask in scene.others[1:] if (mask & (own > 0)).any()]
    if not touching:
        return rings
    group = np.logical_or.reduce([scene.others[0], *touching]).astype(np.uint8)
    return scene.rings(cv2.morphologyEx(group, cv2.MORPH_CLOSE, kernel) > 0)


def draw_lesson(
    rings: list[Ring],
    scene: Scene,
    max_clicks: int,
    rng: np.random.Generator,
    *,
    strangers: Sequence[list[Ring]] = (),
    size: tuple[int, int],
) -> Lesson:
    """Simulate clicks with earlier answers that are the truth with mistakes; half of the lessons have one click.

    Some earlier answers, and some of those to rate, are the outline of a stranger, another object of the input, which
    is of `size` (height, width).
    """
    number = 1 if rng.random() < 0.5 else min(1 + int(rng.geometric(0.35)), max_clicks)
    clicks = [first_click(scene.truth, rng)]
    answer: Mask | None = None
    while len(clicks) < number:
        answer = disturb(scene.truth, scene.others, float(rng.random()) * 0.85 ** len(clicks), rng)
        click = next_click(scene.truth, answer, clicks, rng)
        if click is None:
            break
        clicks.append(click)
    previous = scene.rings(answer) if answer is not None and len(clicks) > 1 else []
    if previous and strangers and rng.random() < STRANGER_SHARE:
        clicks = [clicks[0], first_click(scene.truth, rng)]
        previous = strangers[int(rng.integers(len(strangers)))]
    if strangers and rng.random() < STRANGER_SHARE:
        rated = strangers[int(rng.integers(len(strangers)))]
        quality = mask_iou(rasterize(rings, *size), rasterize(rated, *size))
    else:
        mask = disturb(scene.truth, scene.others, float(rng.random()), rng)
        rated, quality = scene.rings(mask), mask_iou(scene.truth, mask)
    points = np.array([scene.point(click) for click in clicks])
    return Lesson(rings, points, np.array([click.positive for click in clicks]), previous, 1.0, rated, quality)


def recorded_lesson(
    record: Mapping[str, Any], rings: list[Ring], target: Target, size: tuple[int, int], rng: np.random.Generator
) -> Lesson | None:
    """Return what a model was asked and answered about an object; None if the input has lost some of the clicks.

    `record` is in pixels of the image: `clicks` (x, y, positive), and after each of them `outlines` and `ious`.
    """
    number = int(rng.integers(len(record["clicks"]))) + 1

    def moved(points: Any) -> Ring:
        return np.array(points, np.float64).reshape(-1, 2) * target.scale_xy + target.offset_xy

    def outline_after(count: int) -> list[Ring]:
        return [moved(ring) for ring in record["outlines"][count - 1]] if count else []

    clicks = np.array(record["clicks"][:number], np.float64)
    points = np.asarray(moved(clicks[:, :2]), np.float64)
    if not ((points >= 0) & (points < size[::-1])).all():
        return None
    quality = float(record["ious"][number - 1])
    previous, answer = outline_after(number - 1), outline_after(number)
    return Lesson(rings, points, clicks[:, 2] > 0, previous, quality, answer, quality)


def neighbours_of(target: Target, i: int, outlines: Sequence[list[Ring]]) -> list[list[Ring]]:
    """Return the outlines of the objects of a target whose boxes reach into that of object `i`."""
    near = intersects_xyxy(target.boxes_xyxy[i], target.boxes_xyxy)
    return [outlines[j] for j in np.flatnonzero(near).tolist() if j != i and outlines[j]]


def _draw(rings: Sequence[Ring], frame: Frame) -> Mask:
    return rasterize(in_input(rings, frame, (CANVAS, CANVAS)), CANVAS, CANVAS)
