"""Memory of a training process: keeping freed memory for the next step, and how much is in use."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>
MB = 1e6  # bytes


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step; return false if there is no glibc.

    By default glibc maps each large tensor separately and unmaps it when it is freed, so on the CPU every
    step asks the kernel for all its pages again. Peak memory does not change, but it is not given back later.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # mallopt returns 1 on success.
    return bool(mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1)


def memory_mb() -> dict[str, float]:
    """Return `memory_mb` of this process and, with CUDA, `cuda_memory_mb`, the peak of all tensors so far.

    `memory_mb` is the resident size now. Where the system does not report that, it is the peak (macOS) or
    left out (Windows).
    """
    values = {}
    resident = _resident_bytes()
    if resident is not None:
        values["memory_mb"] = resident / MB
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        values["cuda_memory_mb"] = torch.cuda.max_memory_allocated() / MB
    return values


def _resident_bytes() -> int | None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
