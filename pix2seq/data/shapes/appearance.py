"""Named colours that stay distinct under jitter, texture and shading, and two-tone textures.

A texture is a weight in [0, 1] for each pixel, between a colour and its second tone.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Colour = NDArray[np.float32]  # (3,) red, green, blue in [0, 255]
Weights = NDArray[np.float32]  # (H, W) in [0, 1]

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
    # how far a texture's second tone may go towards black and towards white and still fit the name
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


def named_colour(name: str, rng: Generator) -> Colour:
    """Draw a colour that anyone would call `name`."""
    hue, saturation, value = (rng.uniform(*span) for span in HSV_RANGES[name])
    return hsv_to_rgb(hue, saturation, value)


def second_tone(name: str, colour: Colour, rng: Generator) -> Colour:
    """Draw a darker or lighter tone of a named colour, different enough to be seen beside it."""
    darker, lighter = SECOND_TONES[name]
    towards, most = (0.0, darker) if rng.random() * (darker + lighter) < darker else (255.0, lighter)
    return colour + (towards - colour) * np.float32(most * rng.uniform(0.7, 1.0))


def muted_colour(rng: Generator) -> Colour:
    """Draw a colour for a background: any hue, mostly pale or greyish."""
    return hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0, 0.6) ** 1.3, rng.uniform(0.15, 0.97))


def hsv_to_rgb(hue: float, saturation: float, value: float) -> Colour:
    """Convert hue in degrees, saturation and value in [0, 1] to a colour."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32) * 255


def texture_weights(kind: str, rng: Generator, shape: tuple[int, int], period: float) -> Weights | None:
    """Draw a texture as the weight of the second tone per pixel; None for `plain`.

    The pattern repeats about every `period` pixels.
    """
    return None if kind == "plain" else TEXTURES[kind](rng, shape, period)


def blend(share: Weights, colour: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blend two colours by weights (...,) to pixels (..., 3)."""
    return (colour + share[..., None] * (second - colour)).clip(0, 255).astype(np.uint8)


def stripes(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Bars of equal width in a random direction."""
    x, _ = rotated_grid(rng, shape)
    return soft_threshold(np.sin(x * (2 * np.pi / period)), period)


def checks(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """A rotated chessboard."""
    x, y = rotated_grid(rng, shape)
    return soft_threshold(np.sin(x * (np.pi / period)) * np.sin(y * (np.pi / period)), period)


def dots(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Spots in rows."""
    x, y = rotated_grid(rng, shape)
    return soft_threshold(np.cos(x * (2 * np.pi / period)) + np.cos(y * (2 * np.pi / period)) - 0.9, period)


def gradient(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """A ramp from one tone to the other across the full surface."""
    x, _ = rotated_grid(rng, shape)
    low, high = float(x.min()), float(x.max())
    return (x - low) / np.float32(max(high - low, 1.0))


def noise(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """An independent value per pixel."""
    return rng.random(shape, dtype=np.float32)


def clouds(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Soft blobs about three periods wide."""
    cells = (max(2, round(shape[1] / (3 * period))), max(2, round(shape[0] / (3 * period))))
    coarse = rng.random((cells[1], cells[0]), dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def rotated_grid(rng: Generator, shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x and y of every pixel in a frame at a random angle and offset."""
    angle, offset = rng.uniform(0, np.pi), rng.uniform(0, 64)
    x = np.arange(shape[1], dtype=np.float32)[None]
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s + np.float32(offset), y * c - x * s + np.float32(offset)


def soft_threshold(wave: NDArray[np.float32], period: float) -> Weights:
    """Threshold a wave of this period at 0, with a transition about one pixel wide."""
    return (wave * np.float32(max(period / 4, 1.0)) + np.float32(0.5)).clip(0, 1)


TEXTURES: dict[str, Callable[[Generator, tuple[int, int], float], Weights]] = {
    "stripes": stripes,
    "checks": checks,
    "dots": dots,
    "gradient": gradient,
    "noise": noise,
    "clouds": clouds,
}
