"""A polite stop: SIGTERM lets a run save and leave, whatever it is doing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Interrupted(BaseException):
    """Leaves a wait or an evaluation from within; no `except Exception` may swallow it."""


class StopRequest:
    """Whether this process was asked to stop, while the context lasts.

    A schedulers' SIGTERM may come at any time. In the middle of an optimiser step or of a save it is only
    noted; inside `interruptible` it raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part of the work that can be left anywhere, because nothing is half done."""
        self._interruptible = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a run in another is stopped as its host likes.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False  # once is enough, a second signal finds the run leaving
            raise Interrupted
