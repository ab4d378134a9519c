"""Several sequences of an image in one row, without the padding between them.

Outlines have ten tokens or two hundred, and images one object or thirty: side by side and padded to
the longest, nine places of ten would hold nothing. End to end, with a mask that lets each sequence
see itself alone, a row is as long as its image's tokens are many.

Shapes: B images, I sequences an image, T places of a sequence, L places of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Rows of sequences end to end; what is left of a row is padding."""

    tokens: Tensor  # (B, L) int64
    positions: Tensor  # (B, L) int64, of a token in its own sequence
    mask: Tensor  # (B, 1, L, L) bool, true where a place may look
    places: Tensor  # (B, L) int64, where a token stood among the I * T of its image

    def pick(self, values: Tensor) -> Tensor:
        """Values (B, I, T) of tokens to where they are in the rows, (B, L)."""
        return values.flatten(1).gather(1, self.places)


def pack(tokens: Tensor, pad_id: int = 0) -> Packed:
    """Pack tokens (B, I, T), padded with `pad_id` at the end of each sequence."""
    length = tokens.shape[-1]
    flat = tokens.flatten(1)
    real = flat != pad_id
    longest = max(int(real.sum(1).max()), 1)
    places = torch.sort(real.byte(), dim=1, descending=True, stable=True).indices[:, :longest]
    sequence, position = places // length, places % length
    # Padding at a row's end sees itself, like everything, and nothing sees it that counts.
    mask = (sequence[:, :, None] == sequence[:, None]) & (position[:, :, None] >= position[:, None])
    return Packed(flat.gather(1, places), position, mask[:, None], places)
