"""Clean stop on SIGTERM: a run saves its state and ends, whatever it is doing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Interrupted(BaseException):
    """Raised inside a wait or an evaluation to leave it. Not an `Exception`, so that `except Exception` misses it."""


class StopRequest:
    """Record whether this process was asked to stop while the context is active.

    A scheduler's SIGTERM may come at any time. During an optimiser step or a save it is only recorded;
    inside `interruptible` it raises `Interrupted` at once. From then on Ctrl-C is ignored: the state is being saved.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark work that can stop anywhere, because it leaves nothing half done."""
        self._interruptible = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> Self:
        # Python allows only the main thread to set handlers. In another thread, the host program handles SIGTERM.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._previous_int = signal.getsignal(signal.SIGINT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
            signal.signal(signal.SIGINT, self._previous_int)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._interruptible:
            self._interruptible = False  # a second signal must not interrupt the exit
            raise Interrupted
