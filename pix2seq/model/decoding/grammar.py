"""What may come next, so that a generated sequence always parses.

A grammar looks at the ids generated so far and answers, for every row, with a half-open range of
ids and a few single ids besides. It knows ids and phases, not tasks, and keeps nothing between steps.
After a row's end token it may say what it likes: the row is padding.

Shapes: R rows, t ids generated so far, S single ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pix2seq.geometry.polygons import MIN_POINTS

NONE = -1  # no single id


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next: `low` <= id < `high`, or any of `singles`."""

    low: Tensor  # (R,) int64
    high: Tensor  # (R,) int64; at most `low` where the range is empty
    singles: Tensor  # (R, S) int64, NONE where there are fewer

    def forbids(self, ids: Tensor) -> Tensor:
        """Which of `ids` (V,) may not come next: (R, V) bool."""
        forbidden = (ids < self.low[:, None]) | (ids >= self.high[:, None])
        for single in self.singles.unbind(1):
            forbidden &= ids != single[:, None]
        return forbidden

    def span(self) -> tuple[int, int]:
        """The shortest range [first, past the last) that holds all that any row allows. Waits for the device."""
        some = self.low < self.high
        firsts = [self.low[some], self.singles[self.singles != NONE]]
        pasts = [self.high[some], firsts[1] + 1]
        return int(torch.cat(firsts).min()), int(torch.cat(pasts).max())

    def only(self, single: int) -> Tensor:
        """Which rows (R,) allow nothing but this id."""
        others = (self.singles != NONE) & (self.singles != single)
        return (self.low >= self.high) & ~others.any(1)


class Grammar(Protocol):
    """Called before every step with the ids (R, t) generated so far.

    Finished rows leave the batch, so a row is to be judged by its ids alone, not by its place.
    """

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
        top = self.coord_base + self.num_bins
        if phase < 2:
            end = NONE if phase or self.eos_id is None else self.eos_id
            return _constant(ids, self.coord_base, top - 1, end)
        if phase < 4:
            # After an end token the row is padding, whatever this says; clamping keeps it a range.
            low = (ids[:, length - 2] + 1).clamp(self.coord_base + 1, top - 1)
            return Allowed(low, torch.full_like(low, top), ids.new_empty(num_rows, 0))
        first = self.class_base + 1
        return _constant(ids, first, first + self.max_label, self.noise_id)


@dataclass(frozen=True)
class PolygonGrammar:
    """Rings of at least three points; a separator takes the place of a point between two rings."""

    coord_base: int
    num_bins: int
    separator_id: int
    eos_id: int
    max_points: int  # separators included; the end comes after that many at the latest

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        num_rows, length = ids.shape
        low = ids.new_full((num_rows,), self.coord_base)
        high = low + self.num_bins
        none = ids.new_full((num_rows,), NONE)
        separator = torch.full_like(none, self.separator_id)
        if length % 2:
            separating = ids[:, -1] == self.separator_id
            return Allowed(low, torch.where(separating, low, high), torch.where(separating, separator, none)[:, None])
        points = length // 2
        places = torch.arange(1, points + 1, device=ids.device)
        last_separator = ((ids[:, ::2] == self.separator_id) * places).amax(1) if points else torch.zeros_like(none)
        closes = points - last_separator >= MIN_POINTS
        room = self.max_points - points
        if room <= 0:
            high = low
        next_ring = closes & (room > MIN_POINTS)
        singles = [torch.where(closes, self.eos_id, NONE), torch.where(next_ring, separator, none)]
        return Allowed(low, high, torch.stack(singles, dim=1))


@dataclass(frozen=True)
class KeypointGrammar:
    """Points in turn, each two coordinates or the invisible token twice."""

    coord_base: int
    num_bins: int
    invisible_id: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        top = self.coord_base + self.num_bins
        if ids.shape[1] % 2 == 0:
            return _constant(ids, self.coord_base, top, self.invisible_id)
        hidden = ids[:, -1:] == self.invisible_id
        low = torch.full_like(ids[:, 0], self.coord_base)
        high = torch.where(hidden[:, 0], low, low + self.num_bins)
        return Allowed(low, high, torch.where(hidden, self.invisible_id, NONE))


@dataclass(frozen=True)
class TextGrammar:
    """At least one piece of text, then an end, after `max_tokens` ids at the latest."""

    first_piece: int
    text_end: int  # one past the last piece
    eos_id: int
    max_tokens: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        length = ids.shape[1]
        last = length >= self.max_tokens - 1
        return _constant(
            ids, self.first_piece, self.first_piece if last else self.text_end, self.eos_id if length else NONE
        )


def _constant(ids: Tensor, low: int, high: int, single: int) -> Allowed:
    """The same for every row of `ids` (R, t)."""
    ones = ids.new_ones(len(ids))
    return Allowed(ones * low, ones * high, (ones * single)[:, None])
