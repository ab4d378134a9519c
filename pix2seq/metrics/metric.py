"""What a metric is: it collects answers about images, over several processes if need be, and gives scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pix2seq.metrics.calibration import Graded
from pix2seq.types import Target


@dataclass(frozen=True)
class Scores:
    """Named numbers. None stands for a number that is undefined."""

    headline: ClassVar[tuple[str, ...]] = ()  # names that a one-line summary shows; empty: all

    metrics: dict[str, float | None]
    graded: Graded | None = field(default=None, kw_only=True, compare=False)  # answers that are right or wrong

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"metrics": self.metrics}

    def text(self) -> str:
        """Return a table for the terminal."""
        width = max(map(len, self.metrics), default=0)
        return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in self.metrics.items())

    def summary(self) -> str:
        """Return the headline numbers in one line."""
        return ", ".join(f"{name} {_shown(self.metrics[name])}" for name in self.headline or self.metrics)


class Metric(ABC):
    """Scores the answers to one question. It must survive pickling: each process has its own, and they are merged."""

    @abstractmethod
    def add(self, target: Target, answers: Sequence[Any]) -> None:
        """Take the answers about one image; `target` has the labels of the `categories` that `Task.metric` got."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take all that a metric of another process has taken, about other images."""

    @abstractmethod
    def result(self) -> Scores:
        """Return the scores of all images so far."""


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
