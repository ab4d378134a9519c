"""Ends of a command that are no bug: wrong input, and a polite stop."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value, file or folder that a user gave cannot be used.

    The message is one line: what came, what was expected, what to do. The command line prints it
    without a traceback and exits with 2; every other exception is a bug and exits with 1.
    """


class InputErrorElsewhere(InputError):
    """An `InputError` of another process that trains with this one, and that reports it."""


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the command line exits with 143, as after SIGTERM."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `known`, with the nearest known one as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")
