"""Settings: frozen dataclasses with the range of each field beside its type.

    @dataclass(frozen=True)
    class BlurConfig(Settings):
        section = "blur"
        radius: PositiveInt = 3  # pixels
        share: Share = 0.5  # of the images
        kind: Literal["box", "gauss"] = "box"

Creating one, from Python, YAML, `key=value` or a checkpoint's config.json, raises `ValueError` with the full name of a
value outside its range: "blur.share must be at most 1, got 3".
"""

from __future__ import annotations

import math
import numbers
import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; the limits `above` and `below` are themselves left out."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def complaint(self, value: float) -> str | None:
        """Say what a number must be, if it is not."""
        if not -math.inf < value < math.inf:  # nor NaN
            return "be a finite number"
        if self.least is not None and value < self.least:
            return f"be at least {self.least:.12g}"
        if self.above is not None and value <= self.above:
            return "be positive" if self.above == 0 else f"be more than {self.above:.12g}"
        if self.most is not None and value > self.most:
            return f"be at most {self.most:.12g}"
        if self.below is not None and value >= self.below:
            return f"be less than {self.below:.12g}"
        return None


# The largest numbers leave room for everything sensible; beyond them, lists and arithmetic would fail far away.
PositiveInt = Annotated[int, Range(least=1, most=10**9)]
NonNegativeInt = Annotated[int, Range(least=0, most=10**9)]
NonNegativeFloat = Annotated[float, Range(least=0, most=1e9)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
BatchSize = Annotated[int, Range(least=1, most=65_536)]


class Settings:
    """Base of dataclasses of settings, which checks the ranges of their fields."""

    section: ClassVar[str] = ""  # where the settings stand: `model.encoder`; empty at the top

    def __post_init__(self) -> None:
        kind: Any = type(self)  # mypy does not take classes for hashable
        for name, hint in _hints(kind).items():
            if get_origin(hint) is not ClassVar:
                _check(getattr(self, name), hint, f"{self.section}.{name}".lstrip("."))


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)  # evaluates annotations, which takes a while


def _check(value: Any, hint: Any, name: str) -> None:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *rules = parts
        whole = kind is int
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
            raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
        for complaint in filter(None, (rule.complaint(value) for rule in rules)):
            raise ValueError(f"{name} must {complaint}, got {value}")
    elif origin is Literal and value not in parts:
        raise ValueError(f"{name} is {value!r}; expected {_listed(parts)}")
    elif origin in (Union, types.UnionType) and value is not None:
        _check(value, next(part for part in parts if part is not type(None)), name)
    elif origin is tuple:
        each = [parts[0]] * len(value) if parts[-1] is ... else parts
        if len(value) != len(each):
            raise ValueError(f"{name} must have {len(each)} values, got {len(value)}")
        for entry, part in zip(value, each, strict=True):
            _check(entry, part, name)
    elif origin is dict:
        for key, entry in value.items():
            _check(entry, parts[1], f"{name}.{key}")


def _listed(values: tuple[Any, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
