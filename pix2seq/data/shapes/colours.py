"""Named colours that stay apart under jitter, texture and shading."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Colour = NDArray[np.float32]  # (3,) red, green, blue in [0, 255]

HSV_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    # hue in degrees, saturation and value in [0, 1]
    "red": ((-4, 5), (0.78, 0.95), (0.72, 0.9)),
    "orange": ((25, 33), (0.85, 1.0), (0.93, 1.0)),
    "yellow": ((51, 57), (0.78, 0.95), (0.92, 1.0)),
    "green": ((105, 140), (0.6, 0.9), (0.45, 0.72)),
    "blue": ((213, 230), (0.7, 0.9), (0.6, 0.92)),
    "purple": ((272, 286), (0.55, 0.8), (0.48, 0.68)),
    "pink": ((326, 340), (0.35, 0.5), (0.95, 1.0)),
    "white": ((0, 360), (0.0, 0.04), (0.94, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.04, 0.13)),
}
SECOND_TONES: dict[str, tuple[float, float]] = {
    # how far a texture's second tone may go towards black and towards white before the name no longer fits
    "red": (0.4, 0.4),
    "orange": (0.15, 0.5),
    "yellow": (0.15, 0.6),
    "green": (0.45, 0.45),
    "blue": (0.45, 0.5),
    "purple": (0.45, 0.4),
    "pink": (0.12, 0.5),
    "white": (0.25, 0.0),
    "black": (0.0, 0.25),
}
SKIN = ((255, 224, 196), (240, 194, 160), (214, 160, 120), (166, 116, 80), (120, 80, 56), (90, 60, 44))
HAIR = ((30, 24, 22), (70, 46, 30), (120, 80, 44), (200, 160, 90), (150, 150, 150), (140, 60, 30))


def named(name: str, rng: Generator) -> Colour:
    """A colour that anyone would call `name`."""
    hue, saturation, value = (rng.uniform(*span) for span in HSV_RANGES[name])
    return hsv(hue, saturation, value)


def second_tone(name: str, colour: Colour, rng: Generator) -> Colour:
    """A darker or lighter tone of a named colour, far enough to be seen beside it."""
    darker, lighter = SECOND_TONES[name]
    towards, most = (0.0, darker) if rng.random() * (darker + lighter) < darker else (255.0, lighter)
    return colour + (towards - colour) * np.float32(most * rng.uniform(0.7, 1.0))


def muted(rng: Generator) -> Colour:
    """A colour for a background: any hue, mostly pale or greyish."""
    return hsv(rng.uniform(0, 360), rng.uniform(0, 0.6) ** 1.3, rng.uniform(0.15, 0.97))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in degrees, saturation and value in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32) * 255
