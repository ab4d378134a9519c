"""A jointed person with COCO's 17 keypoints: a small skeleton in 3D, posed, turned and projected.

3D coordinates are x to the right, y down and z towards the viewer; one unit is the height of a standing
person. A person at turn 0 faces the viewer, so their left side is to the right in the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pix2seq.data.shapes.figures import Ring

KEYPOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow "
    "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
SKELETON = (  # COCO's, counted from 1
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip

NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR = range(5)
SHOULDERS, ELBOWS, WRISTS, HIPS, KNEES, ANKLES = ((i, i + 1) for i in range(5, 17, 2))
HEAD_RADIUS = 0.095
ARM_RADIUS, LEG_RADIUS, TORSO_RADIUS = 0.04, 0.05, 0.045
FACE = np.array(  # nose, eyes, ears on a ball of radius 1, facing the viewer
    [[0, 0.12, 0.99], [0.42, -0.16, 0.88], [-0.42, -0.16, 0.88], [1.0, 0.02, 0.0], [-1.0, 0.02, 0.0]]
)


@dataclass(frozen=True)
class Part:
    """A part of the person in one colour. `paint` is "clothes", "sleeves", "trousers", "skin", "hair" or "ink"."""

    paint: str
    rings: list[Ring]  # overlapping rings of the same orientation
    points: tuple[int, ...] = ()  # keypoints on this part
    solid: bool = True  # False if only drawn onto the parts below: eyes and hair


@dataclass(frozen=True)
class Pose:
    """A posed person, centred on the box, longest side 1: parts from back to front, and keypoints."""

    parts: list[Part]
    points: NDArray[np.float64]  # (17, 2) x, y
    faces_viewer: NDArray[np.bool_]  # (17,) False for points on the far side of the head


def pose(rng: Generator) -> Pose:
    """Draw a person in a random natural pose, seen from a random side."""
    joints = posed_joints(rng)
    turn = rng.normal(0, 0.5) + (np.pi if rng.random() < 0.25 else 0.0)
    joints = joints @ rotation_y(turn).T
    head = joints[17]
    nod = rotation_y(turn + rng.normal(0, 0.3))
    direction = FACE @ nod.T
    joints[:5] = head + direction * HEAD_RADIUS * (1, 1.12, 1)
    roll = rng.normal(0, 0.12) if rng.random() < 0.85 else rng.uniform(-1.3, 1.3)
    joints[:, :2] = joints[:, :2] @ np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    front = np.ones(17, bool)
    front[:5] = direction[:, 2] > -0.2
    parts = body_parts(joints, front)
    solid = np.concatenate([ring for part in parts if part.solid for ring in part.rings])
    low, high = solid.min(0), solid.max(0)
    centre, scale = (low + high) / 2, (high - low).max()
    scaled = [
        Part(part.paint, [(ring - centre) / scale for ring in part.rings], part.points, part.solid) for part in parts
    ]
    return Pose(scaled, (joints[:17, :2] - centre) / scale, front)


def posed_joints(rng: Generator) -> NDArray[np.float64]:
    """Draw joints (18, 3): COCO's points with those of the face still at 0, then the centre of the head."""
    joints = np.zeros((18, 3))
    kind = rng.choice(4, p=[0.4, 0.25, 0.2, 0.15])  # standing, walking, arms up, jumping or crouching
    lean = np.array([rng.normal(0, 0.06), 0.0, rng.normal(0, 0.03)])
    stride = rng.uniform(0.35, 0.8) * rng.choice((-1, 1)) if kind == 1 else rng.normal(0, 0.1)
    for side, sign in enumerate((1.0, -1.0)):  # left is at positive x while the figure faces the viewer
        hip = np.array([0.075 * sign, 0.53, 0.0])
        shoulder = np.array([0.125 * sign, 0.25, 0.0]) + lean * (1, 1, 1)
        if kind == 2:
            lift, bend = rng.uniform(1.7, 2.9), rng.uniform(-0.3, 0.7)
        else:
            lift, bend = rng.uniform(0.15, 1.1), rng.uniform(-0.6, 1.3)
        swing = -stride * sign if kind == 1 else rng.normal(0, 0.3)
        elbow = shoulder + 0.17 * limb(lift, swing, sign)
        wrist = elbow + 0.16 * limb(lift + bend * rng.choice((1.0, -0.4)), swing + rng.uniform(0, 0.8), sign)
        if kind == 3:
            spread, knee_bend, step = rng.uniform(0.2, 0.75), rng.uniform(0.2, 0.9), rng.normal(0, 0.3)
        else:
            spread, knee_bend, step = rng.uniform(0.04, 0.3), rng.uniform(0, 0.15), stride * sign
        knee = hip + 0.22 * limb(spread, step, sign)
        back = -knee_bend if kind == 3 else -rng.uniform(0.0, 0.4)
        ankle = knee + 0.21 * limb(spread - knee_bend, step + back, sign)
        for name, joint in zip(
            (SHOULDERS, ELBOWS, WRISTS, HIPS, KNEES, ANKLES), (shoulder, elbow, wrist, hip, knee, ankle), strict=True
        ):
            joints[name[side]] = joint
    joints[17] = np.array([0, 0.105, 0.02]) + lean * 1.5
    return joints


def limb(lift: float, swing: float, sign: float) -> NDArray[np.float64]:
    """Return the unit vector of a limb: `lift` radians sideways from hanging down, `swing` radians forward."""
    return np.array([sign * np.sin(lift), np.cos(lift) * np.cos(swing), np.cos(lift) * np.sin(swing)])


def rotation_y(angle: float) -> NDArray[np.float64]:
    """Return the (3, 3) rotation about the vertical axis."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def body_parts(joints: NDArray[np.float64], front: NDArray[np.bool_]) -> list[Part]:
    """Build the parts from back to front, ordered by their depth."""
    flat = joints[:, :2]
    layers: list[tuple[float, list[Part]]] = []
    for side in (0, 1):
        arm = [SHOULDERS[side], ELBOWS[side], WRISTS[side]]
        leg = [HIPS[side], KNEES[side], ANKLES[side]]
        sleeve = capsules(flat[arm[:2]], flat[arm[1:]], ARM_RADIUS)
        hand = disc(flat[arm[2]], ARM_RADIUS * 1.1)
        depth = float(joints[arm[1:], 2].mean())
        layers.append((depth, [Part("sleeves", sleeve, tuple(arm[:2])), Part("skin", [hand], (arm[2],))]))
        depth = float(joints[leg[1:], 2].mean()) - 0.02
        layers.append((depth, [Part("trousers", capsules(flat[leg[:2]], flat[leg[1:]], LEG_RADIUS), tuple(leg))]))
    corners = np.concatenate([disc(flat[i], TORSO_RADIUS) for i in (*SHOULDERS, *HIPS)])
    torso = hull(corners)
    layers.append((float(joints[[*SHOULDERS, *HIPS], 2].mean()), [Part("clothes", [torso], (*SHOULDERS, *HIPS))]))
    head = flat[17]
    neck = capsules(flat[None, list(SHOULDERS)].mean(1), head[None], 0.035)
    ball = disc(head, HEAD_RADIUS, 1.12)
    ears = [disc(flat[i], 0.028) for i in (LEFT_EAR, RIGHT_EAR) if front[i]]
    face = [Part("skin", [*neck, ball, *ears], tuple(i for i in range(5) if front[i]))]
    facing = joints[NOSE, 2] - joints[17, 2]
    up = (head - flat[list(HIPS)].mean(0)) / np.linalg.norm(head - flat[list(HIPS)].mean(0))
    if facing < 0:
        face.append(Part("hair", [disc(head, HEAD_RADIUS, 1.12)], (), False))
    else:
        cap = disc(np.zeros(2), HEAD_RADIUS, 1.12)
        across = np.array([-up[1], up[0]])
        cap = cap[cap @ up > 0.045] if np.count_nonzero(cap @ up > 0.045) >= 3 else cap[:3]
        face.append(Part("hair", [hull(cap + head)], (), False))
        eyes = [disc(flat[i], 0.016) for i in (LEFT_EYE, RIGHT_EYE) if front[i]]
        mouth = head - up * 0.05
        face.append(Part("ink", [*eyes, *capsules((mouth - across * 0.0)[None], mouth[None], 0.012)], (), False))
    layers.append((float(joints[17, 2]) + 0.03, face))
    return [part for _, parts in sorted(layers, key=lambda layer: layer[0]) for part in parts]


def capsules(start: NDArray[np.float64], stop: NDArray[np.float64], radius: float) -> list[Ring]:
    """Return rounded bars between points (L, 2)."""
    rings = []
    for a, b in zip(start, stop, strict=True):
        along = np.arctan2(b[1] - a[1], b[0] - a[0])
        angles = along + np.linspace(-np.pi / 2, np.pi / 2, 7)
        half = radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
        rings.append(np.concatenate((b + half, a - half)))
    return rings


def disc(centre: NDArray[np.float64], radius: float, stretch: float = 1.0) -> Ring:
    """Return a circle, or an ellipse `stretch` times as tall as wide."""
    return centre + UNIT_DISC * (radius, radius * stretch)


def hull(points: NDArray[np.float64]) -> Ring:
    """Return the convex hull, with the same orientation as `disc`."""
    ring = cv2.convexHull(points.astype(np.float32), clockwise=True)[:, 0].astype(np.float64)
    x, y = ring.T
    return ring if np.dot(x, np.roll(y, -1)) > np.dot(y, np.roll(x, -1)) else ring[::-1]


UNIT_DISC = np.stack((np.cos(np.arange(16) * np.pi / 8), np.sin(np.arange(16) * np.pi / 8)), axis=1)
