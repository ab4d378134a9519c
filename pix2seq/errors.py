"""Exceptions that end a command without being a bug: wrong input, and a requested stop."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_SHOWN = 5  # of things that a message lists


class InputError(ValueError):
    """A value, file or folder from the user cannot be used.

    The message is one line: what came, what was expected, what to do. The command line prints it
    without a traceback and exits with 2; any other exception is a bug and exits with 1.
    """


class InputErrorElsewhere(InputError):
    """An `InputError` of another process of the same training run; that process reports it."""


class Stopped(Exception):
    """A run stopped on request after saving its state; the command line exits with 143, as after SIGTERM."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return an `InputError` for a name that is not in `known`; it suggests the nearest known name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")


def shortened(things: Sequence[object], most: int = MAX_SHOWN) -> list[str]:
    """Return the first things as text, to be joined in a message; beyond `most` of them, how many more there are."""
    more = [f"and {len(things) - most} more"] if len(things) > most else []
    return [*map(str, things[:most]), *more]
