"""Pack the sequences of an image end to end in one row, without padding between them.

A polygon has ten tokens or two hundred, and an image one object or thirty. Padded to the longest, nine
tokens of ten would be padding. In a packed row, a mask lets each token see only its own sequence, up to itself.

Shapes: B images, I sequences per image, T tokens of a padded sequence, L tokens of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Rows of sequences end to end, padded at the end of the row."""

    tokens: Tensor  # (B, L) int64
    positions: Tensor  # (B, L) int64, position of each token in its own sequence
    mask: Tensor  # (B, 1, L, L) bool, true where a token may look
    indices: Tensor  # (B, L) int64, index of each token among the I * T of its image

    def pick(self, values: Tensor) -> Tensor:
        """Pick the values (B, I, T) of the tokens in the rows, (B, L)."""
        return values.flatten(1).gather(1, self.indices)


def pack(tokens: Tensor, pad_id: int = 0) -> Packed:
    """Pack tokens (B, I, T) that are padded with `pad_id` at the end of each sequence."""
    length = tokens.shape[-1]
    flat = tokens.flatten(1)
    real = flat != pad_id
    longest = max(int(real.sum(1).max()), 1)
    indices = torch.sort(real.byte(), dim=1, descending=True, stable=True).indices[:, :longest]
    sequence, position = indices // length, indices % length
    # Padding at the end of a row sees itself, so that its softmax is defined. No real token sees it.
    mask = (sequence[:, :, None] == sequence[:, None]) & (position[:, :, None] >= position[:, None])
    return Packed(flat.gather(1, indices), position, mask[:, None], indices)
