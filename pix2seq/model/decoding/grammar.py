"""Grammars: which ids may come next, so that a generated sequence always parses.

A grammar maps the ids generated so far to a half-open range of allowed ids and a few single ids, for each row.
It knows ids and phases, but no tasks, and has no state. Its answer for a row that has ended does not matter,
because the row is padding.

Ids are a tensor of PyTorch, or an array of NumPy in `pix2seq.runtime`, and answers are of the same kind. So these
grammars use what both have: operators, slices and methods such as `sum` and `clip`.

Shapes: R rows, t ids generated so far, S single ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pix2seq.geometry.polygons import MIN_POINTS

if TYPE_CHECKING:
    from torch import Tensor

NONE = -1  # in place of a single id


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next: `low` <= id < `high`, or any of `singles`."""

    low: Tensor  # (R,) int64
    high: Tensor  # (R,) int64; at most `low` if the range is empty
    singles: Tensor  # (R, S) int64, filled up with NONE

    def forbids(self, ids: Tensor) -> Tensor:
        """Return (R, V) bool, true where one of `ids` (V,) is not allowed."""
        forbidden = (ids < self.low[:, None]) | (ids >= self.high[:, None])
        for column in range(self.singles.shape[1]):
            forbidden &= ids != self.singles[:, column, None]
        return forbidden

    def span(self) -> tuple[int, int]:
        """Return the shortest range [first, end) of all ids that any row allows. Waits for the device."""
        import torch  # here, because `pix2seq.runtime` has none and asks for no span

        some = self.low < self.high
        firsts = [self.low[some], self.singles[self.singles != NONE]]
        ends = [self.high[some], firsts[1] + 1]
        return int(torch.cat(firsts).min()), int(torch.cat(ends).max())

    def only(self, single: int) -> Tensor:
        """Return which rows (R,) allow no id but `single`."""
        others = (self.singles != NONE) & (self.singles != single)
        return (self.low >= self.high) & ~others.any(1)


class Grammar(Protocol):
    """A function of the ids (R, t) generated so far, called before every step.

    Rows leave the batch when they finish, so the result for a row must depend only on its ids, not on its index.
    """

    def allowed(self, ids: Tensor) -> Allowed: ...


@dataclass(frozen=True)
class BoxGrammar:
    """A list of boxes: two corners, the second at least a bin beyond the first, then a class."""

    coord_base: int
    num_bins: int
    class_base: int
    max_label: int
    noise_id: int
    eos_id: int | None  # None: only length ends the list

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        phase = ids.shape[1] % 5
        top = self.coord_base + self.num_bins
        if phase < 2:
            end = NONE if phase or self.eos_id is None else self.eos_id
            return _constant(ids, self.coord_base, top - 1, end)
        if phase < 4:
            return _second_corner(ids, self.coord_base, top)
        first = self.class_base + 1
        return _constant(ids, first, first + self.max_label, self.noise_id)


@dataclass(frozen=True)
class RangeGrammar:
    """Ids from `first` to `last`, and one `other`."""

    first: int
    last: int
    other: int = NONE

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        return _constant(ids, self.first, self.last + 1, self.other)


@dataclass(frozen=True)
class RatedBoxGrammar:
    """An id from `first` to `last`, then a box: two corners, the second at least a bin beyond the first."""

    first: int
    last: int
    coord_base: int
    num_bins: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        length, top = ids.shape[1], self.coord_base + self.num_bins
        if length == 0:
            return _constant(ids, self.first, self.last + 1, NONE)
        if length < 3:
            return _constant(ids, self.coord_base, top - 1, NONE)
        return _second_corner(ids, self.coord_base, top)


@dataclass(frozen=True)
class PolygonGrammar:
    """Polygons of at least three points, with a separator in place of a point between two polygons."""

    coord_base: int
    num_bins: int
    separator_id: int
    eos_id: int
    max_points: int  # including separators; then the sequence must end

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        if ids.shape[1] % 2:
            return _pair(ids, self.coord_base, self.num_bins, self.separator_id)
        points = ids.shape[1] // 2
        latest = ids[:, ::2][:, -MIN_POINTS:]
        closes = (latest != self.separator_id).sum(1) == MIN_POINTS
        points_left = self.max_points - points
        next_polygon = closes & (points_left > MIN_POINTS)
        low = closes * 0 + self.coord_base
        high = low + self.num_bins * (points_left > 0)
        singles = (_choose(closes, self.eos_id, NONE), _choose(next_polygon, self.separator_id, NONE))
        return Allowed(low, high, _stack(singles))


@dataclass(frozen=True)
class KeypointGrammar:
    """A list of points, each two coordinates or the invisible token twice."""

    coord_base: int
    num_bins: int
    invisible_id: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        if ids.shape[1] % 2:
            return _pair(ids, self.coord_base, self.num_bins, self.invisible_id)
        return _constant(ids, self.coord_base, self.coord_base + self.num_bins, self.invisible_id)


@dataclass(frozen=True)
class TextGrammar:
    """At least one piece of text, then the end token, with at most `max_tokens` ids in total."""

    first_piece: int
    text_end: int  # one after the last piece
    eos_id: int
    max_tokens: int

    def allowed(self, ids: Tensor) -> Allowed:
        """See `Grammar`."""
        length = ids.shape[1]
        last = length >= self.max_tokens - 1
        return _constant(
            ids, self.first_piece, self.first_piece if last else self.text_end, self.eos_id if length else NONE
        )


def _second_corner(ids: Tensor, coord_base: int, top: int) -> Allowed:
    """Return the range of a coordinate at least a bin beyond the one two ids before, for rows of boxes (R, t)."""
    # Clipping keeps the range valid in rows that have ended.
    low = (ids[:, ids.shape[1] - 2] + 1).clip(coord_base + 1, top - 1)
    return Allowed(low, low * 0 + top, ids[:, :0])


def _constant(ids: Tensor, low: int, high: int, single: int) -> Allowed:
    """Return the same range and single id for every row of `ids` (R, t)."""
    zeros = ids[:, :0].sum(1)
    return Allowed(zeros + low, zeros + high, (zeros + single)[:, None])


def _pair(ids: Tensor, coord_base: int, num_bins: int, single: int) -> Allowed:
    """Return what follows the first half of a pair: `single` after `single`, else a coordinate."""
    again = ids[:, -1] == single
    low = again * 0 + coord_base
    return Allowed(low, low + num_bins * ~again, _choose(again, single, NONE)[:, None])


def _choose(condition: Tensor, if_true: int, if_false: int) -> Tensor:
    """Return one of two ids for each row of a condition (R,)."""
    return condition * (if_true - if_false) + if_false


def _stack(columns: tuple[Tensor, ...]) -> Tensor:
    """Return columns (R,) side by side, (R, S)."""
    if isinstance(columns[0], np.ndarray):
        return np.stack(columns, 1)
    import torch

    return torch.stack(columns, 1)
