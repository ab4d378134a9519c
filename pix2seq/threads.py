"""How many threads PyTorch uses on the CPU: all cores, or one if other processes keep the cores busy.

The threads of an operation wait for each other at its end. If other processes hold a core, all of them wait for the
thread that has none, at every operation, and two threads can be ten times as slow as one.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ROUNDS, WINDOW = 5, 0.03  # measurements of each form, and seconds of one; a scheduler's time slice is 3 to 4 ms
BUSY = (
    3.0  # one thread must be this much faster; 15 times on busy cores, and slower on idle ones, so it is no close call
)


def is_busy() -> bool:
    """Measure whether one thread is clearly faster than all, for 0.3 s; false if the user set the threads.

    The number of threads is left as it was.
    """
    threads = torch.get_num_threads()
    if threads == 1 or _set_by_user():
        return False
    try:
        rates: dict[int, list[float]] = {1: [], threads: []}
        for _ in range(ROUNDS):
            for number, some in rates.items():
                torch.set_num_threads(number)
                some.append(_operations_per_second())
    finally:
        torch.set_num_threads(threads)
    return statistics.median(rates[1]) > BUSY * statistics.median(rates[threads])


def use_one_thread() -> None:
    """Let PyTorch compute with one thread from here on, unless the user set how many."""
    if not _set_by_user() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        print(
            "other processes keep the CPU busy, so PyTorch uses one thread; OMP_NUM_THREADS=N sets N", file=sys.stderr
        )


def _set_by_user() -> bool:
    return any(os.environ.get(name) for name in SET_BY_USER)


def _operations_per_second() -> float:
    """Time operations of a small model."""
    x, weight = torch.ones(1024, 192), torch.ones(192, 192)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < WINDOW:
        F.layer_norm(F.linear(x, weight), (192,))
        count += 2
    return count / elapsed
