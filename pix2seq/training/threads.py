"""Whether a run on the CPU uses all cores, or one thread because other processes keep the cores busy.

The threads of an operation wait for each other at its end. If another process holds a core, all of them wait for the
thread that has none, at each of a thousand operations of a step, and one thread alone is faster.
"""

from __future__ import annotations

import os
import statistics
import sys

import torch
from tqdm import tqdm

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ALL_CORES = range(3, 8)  # the steps that are timed with all threads; libraries are set up by the first three
ALONE = range(8, 13)  # those that are timed with one
# Share of the time with all threads that one thread may take to be chosen: two idle cores measured 1.3, two that are
# busy with other processes 0.5. Between them no run decides one way today and another way tomorrow.
MAX_SHARE = 0.8


class ThreadTrial:
    """Times the first steps of a run with all threads and with one, then keeps the faster.

    Sums depend on the number of threads in their last bits. So which steps are timed is fixed, and the choice belongs
    to the state of the run: a resumed run computes what it would have computed.
    """

    def __init__(self, one_thread: bool | None) -> None:
        """`one_thread` is the choice of the run that is resumed, or None."""
        self.one_thread = one_thread
        self._threads = torch.get_num_threads()
        if self._threads == 1 or any(os.environ.get(name) for name in SET_BY_USER):
            self.one_thread = False
        self._seconds: dict[range, list[float]] = {ALL_CORES: [], ALONE: []}

    def before_step(self, step: int) -> None:
        """Set the threads for a step, counted from 0."""
        alone = step in ALONE if self.one_thread is None else self.one_thread
        if self._threads > 1:
            torch.set_num_threads(1 if alone else self._threads)

    def after_step(self, step: int, seconds: float) -> None:
        """Take the time of a step, without the wait for its data, and choose after the last one that is timed."""
        if self.one_thread is not None:
            return
        for steps, times in self._seconds.items():
            if step in steps:
                times.append(seconds)
        if step < ALONE[-1]:
            return
        all_cores, alone = self._seconds.values()
        # A run that is resumed amid the trial may lack one of them.
        self.one_thread = bool(all_cores and alone) and (
            statistics.median(alone) < MAX_SHARE * statistics.median(all_cores)
        )
        if self.one_thread:
            message = "other processes keep the CPU busy: training with one thread; OMP_NUM_THREADS=N sets N"
            tqdm.write(message, file=sys.stderr)
