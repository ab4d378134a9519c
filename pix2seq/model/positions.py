"""Position encodings in one and two dimensions.

`sincos` is the official encoding (google-research/pix2seq, `architectures/transformers.py`), with one wave across
the image at most and many slower ones. `fourier` has waves from half a cycle to `MAX_CYCLES` across the image, so
that neighbouring positions differ clearly. Trained from scratch, a model with `fourier` learns to localise from about
half as many images. Both are functions of relative position and fit an image of any size. `learned` encodings fit a
single grid.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

PositionKind = Literal["sincos", "fourier", "learned"]
MIN_CYCLES, MAX_CYCLES = 0.5, 16.0  # waves across the image


class GridPositions(nn.Module):
    """Encodings of the cells of a grid: fixed ones for any grid, or learned ones for a single grid."""

    def __init__(self, kind: PositionKind, dim: int, grid: tuple[int, int]) -> None:
        """`grid` is the rows and columns of learned encodings."""
        super().__init__()
        self.kind = kind
        self.dim = dim
        self.grid = grid
        if kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid[0] * grid[1], dim), std=0.02))

    def forward(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return encodings (rows * columns, dim), row by row. Raises `ValueError` if learned for another grid."""
        if self.kind != "learned":
            return _fixed(self.kind, rows, columns, self.dim, device)
        if (rows, columns) != self.grid:
            raise ValueError(
                f"positions were learned for a grid of {self.grid[0]}x{self.grid[1]}, got {rows}x{columns}; "
                "use images of the size in the model's config"
            )
        return self.table


@lru_cache(maxsize=64)
def _fixed(kind: PositionKind, rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """Fixed encodings, computed on the host and copied to a device once: each copy would wait for it."""
    encode = sincos_2d if kind == "sincos" else fourier_2d
    with torch.device("cpu"), torch.inference_mode(False):
        return encode(rows, columns, dim).to(device)


def sincos_1d(length: int, dim: int) -> Tensor:
    """Return encodings (length, dim): sines of all frequencies, then cosines. `dim` must be even."""
    return _encode(_scaled_positions(length), dim)


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """Return encodings (height * width, dim), row by row: the first half of `dim` holds y, the second x.

    A grid with a single row or column gets one-dimensional encodings. `dim` must be divisible by 4.
    """
    if height == 1 or width == 1:
        return sincos_1d(height * width, dim)
    y = _encode(_scaled_positions(height), dim // 2)[:, None].expand(-1, width, -1)
    x = _encode(_scaled_positions(width), dim // 2)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).reshape(height * width, dim)


def fourier_1d(positions: Tensor, dim: int) -> Tensor:
    """Encode positions (N,) in [0, 1] as (N, dim): sines of all frequencies, then cosines. `dim` must be even."""
    if dim % 2:
        raise ValueError(f"Fourier encodings need an even width, got {dim}")
    share = torch.arange(dim // 2) / max(dim // 2 - 1, 1)
    cycles = MIN_CYCLES * (MAX_CYCLES / MIN_CYCLES) ** share
    angles = 2 * math.pi * positions[:, None] * cycles
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def fourier_2d(height: int, width: int, dim: int) -> Tensor:
    """Return encodings (height * width, dim), row by row: y, then x. `dim` must be divisible by 4."""
    y = fourier_1d((torch.arange(height) + 0.5) / height, dim // 2)[:, None].expand(-1, width, -1)
    x = fourier_1d((torch.arange(width) + 0.5) / width, dim // 2)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).reshape(height * width, dim)


def sequence_encodings(length: int, dim: int) -> Tensor:
    """Return encodings (length, dim) of sequence positions, with waves of 6 to several thousand tokens (1706.03762)."""
    rates = 1000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _scaled_positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32) / max(length - 1, 1) * (2 * math.pi)


def _encode(positions: Tensor, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"sin-cos encodings need an even width, got {dim}")
    pair = torch.arange(dim // 2, dtype=torch.float32)
    rates = 1.0 / torch.pow(10_000.0, 2 * pair / dim)
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
