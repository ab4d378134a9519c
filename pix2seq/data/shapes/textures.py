"""Two-tone surfaces, computed per pixel as a weight t in [0, 1] between a colour and its second tone."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Weights = NDArray[np.float32]  # (H, W) in [0, 1]
Grid = tuple[NDArray[np.float32], NDArray[np.float32]]  # x and y of every pixel in the surface's own turned frame


def weights(kind: str, rng: Generator, shape: tuple[int, int], period: float) -> Weights | None:
    """How far each pixel of a surface goes towards the second tone; None for `plain`, which goes nowhere.

    The pattern repeats every `period` pixels or so.
    """
    return None if kind == "plain" else TEXTURES[kind](rng, shape, period)


def blend(share: Weights, colour: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Weights (...,) to pixels (..., 3) between two colours."""
    return (colour + share[..., None] * (second - colour)).clip(0, 255).astype(np.uint8)


def stripes(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Bars of one width in any direction."""
    x, _ = turned(rng, shape)
    return step(np.sin(x * (2 * np.pi / period)), period)


def checks(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """A turned chessboard."""
    x, y = turned(rng, shape)
    return step(np.sin(x * (np.pi / period)) * np.sin(y * (np.pi / period)), period)


def dots(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Spots in rows."""
    x, y = turned(rng, shape)
    return step(np.cos(x * (2 * np.pi / period)) + np.cos(y * (2 * np.pi / period)) - 0.9, period)


def gradient(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """From one tone to the other across the whole surface."""
    x, _ = turned(rng, shape)
    low, high = float(x.min()), float(x.max())
    return (x - low) / np.float32(max(high - low, 1.0))


def noise(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Grain, a value a pixel."""
    return rng.random(shape, dtype=np.float32)


def clouds(rng: Generator, shape: tuple[int, int], period: float) -> Weights:
    """Soft blotches about three periods wide."""
    cells = (max(2, round(shape[1] / (3 * period))), max(2, round(shape[0] / (3 * period))))
    coarse = rng.random((cells[1], cells[0]), dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def turned(rng: Generator, shape: tuple[int, int]) -> Grid:
    """Pixel coordinates in a frame at a random angle and offset."""
    angle, offset = rng.uniform(0, np.pi), rng.uniform(0, 64)
    x = np.arange(shape[1], dtype=np.float32)[None]
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s + np.float32(offset), y * c - x * s + np.float32(offset)


def step(wave: NDArray[np.float32], period: float) -> Weights:
    """A soft threshold at 0, about a pixel wide for a wave of this period."""
    return (wave * np.float32(max(period / 4, 1.0)) + np.float32(0.5)).clip(0, 1)


TEXTURES: dict[str, Callable[[Generator, tuple[int, int], float], Weights]] = {
    "stripes": stripes,
    "checks": checks,
    "dots": dots,
    "gradient": gradient,
    "noise": noise,
    "clouds": clouds,
}
