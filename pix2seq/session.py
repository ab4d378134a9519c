"""A series of clicks on one object: each improves the last answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pix2seq.errors import InputError
from pix2seq.types import Clicks, ObjectMask


@dataclass
class Session:
    """Clicks on an image that is encoded once. `Predictor.session` makes one; it holds all that undoing needs.

    What a click is answered depends only on the clicks and the answer before, so that a server need not hold sessions.
    """

    ask: Callable[[Clicks], list[ObjectMask]]
    box_xyxy: tuple[float, float, float, float] | None = None  # around the object, if the user drew one
    _steps: list[tuple[Clicks, list[ObjectMask], int]] = field(default_factory=list)  # clicks, answers, the chosen one

    @property
    def candidates(self) -> list[ObjectMask]:
        """What the clicks so far can mean, the chosen answer included; best first."""
        return self._steps[-1][1] if self._steps else []

    @property
    def mask(self) -> ObjectMask | None:
        """The chosen answer; None before the first click."""
        return self.candidates[self._steps[-1][2]] if self.candidates else None

    def add(self, x: float, y: float, positive: bool = True) -> list[ObjectMask]:
        """Click at x, y in pixels of the image, on the object or, if not `positive`, on what is too much."""
        clicks = self._steps[-1][0] if self._steps else Clicks((), (), self.box_xyxy)
        before = () if self.mask is None else tuple(self.mask.polygons)
        more = replace(clicks, points=(*clicks.points, (x, y)), positive=(*clicks.positive, positive), previous=before)
        self._steps.append((more, self.ask(more), 0))
        return self.candidates

    def choose(self, number: int) -> ObjectMask:
        """Go on from candidate `number`, counted from 0."""
        if not 0 <= number < len(self.candidates):
            raise InputError(f"there is no candidate {number}; the last click has {len(self.candidates)}")
        self._steps[-1] = (*self._steps[-1][:2], number)
        return self.candidates[number]

    def undo(self) -> list[ObjectMask]:
        """Take the last click back; nothing happens without one."""
        if self._steps:
            self._steps.pop()
        return self.candidates

    def reset(self) -> None:
        """Take all clicks back."""
        self._steps.clear()
