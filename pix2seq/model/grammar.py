"""What may come next, so that a generated sequence always parses.

A grammar looks at the ids generated so far and answers, for every row, with a half-open range of
ids and a few single ids besides. It knows ids and phases, not tasks.

Shapes: R rows, t ids generated so far, S single ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next: `low` <= id < `high`, or any of `singles`."""

    low: Tensor  # (R,) int64
    high: Tensor  # (R,) int64
    singles: Tensor  # (S,) int64, the same for every row

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (R, V) with every other id at minus infinity."""
        ids = torch.arange(logits.shape[-1], device=logits.device)
        allowed = (ids >= self.low[:, None]) & (ids < self.high[:, None])
        allowed[:, self.singles] = True
        return logits.masked_fill(~allowed, -torch.inf)


class Grammar(Protocol):
    """Called before every step with the ids (R, t) generated so far."""

    def allowed(self, ids: Tensor) -> Allowed: ...


@dataclass(frozen=True)
class BoxGrammar:
    """Boxes in turn: two corners, the second at least a bin beyond the first, then a class."""

    coord_base: int
    num_bins: int
    class_base: int
    max_label: int
    noise_id: int
    eos_id: int | None  # None: the list does not end before its length is reached

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        num_rows, length = ids.shape
        phase = length % 5
        ones = ids.new_ones(num_rows)
        top = self.coord_base + self.num_bins
        none = ids.new_empty(0)
        if phase < 2:
            singles = none if phase or self.eos_id is None else ids.new_tensor([self.eos_id])
            return Allowed(ones * self.coord_base, ones * (top - 1), singles)
        if phase < 4:
            # After an end token the row is padding, whatever this says; clamping keeps it a range.
            low = (ids[:, length - 2] + 1).clamp(self.coord_base + 1, top - 1)
            return Allowed(low, ones * top, none)
        first = self.class_base + 1
        return Allowed(ones * first, ones * (first + self.max_label), ids.new_tensor([self.noise_id]))
