"""Fixed sin-cos position codes, in one and two dimensions.

Coordinates are scaled to [0, 2 pi] whatever the length, so the same place in a picture has the same
code at every resolution. Reference: google-research/pix2seq, `architectures/transformers.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_1d(length: int, dim: int) -> Tensor:
    """Codes (length, dim): sines of all frequencies, then cosines. `dim` must be even."""
    return _codes(_scaled_positions(length), dim)


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """Codes (height * width, dim), row by row: the first half of `dim` holds y, the second x.

    A grid with a single row or column gets the one-dimensional codes. `dim` must be divisible by 4.
    """
    if height == 1 or width == 1:
        return sincos_1d(height * width, dim)
    y = _codes(_scaled_positions(height), dim // 2)[:, None].expand(-1, width, -1)
    x = _codes(_scaled_positions(width), dim // 2)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).reshape(height * width, dim)


def _scaled_positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32) / max(length - 1, 1) * (2 * math.pi)


def _codes(positions: Tensor, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"sin-cos codes need an even width, got {dim}")
    pair = torch.arange(dim // 2, dtype=torch.float32)
    rates = 1.0 / torch.pow(10_000.0, 2 * pair / dim)
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
