"""How much memory a run takes, for its log."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

MB = 1e6  # bytes


def memory_mb() -> dict[str, float]:
    """`memory_mb` of this process, and with CUDA `cuda_memory_mb`, the most that tensors have taken so far.

    Of the process it is what is resident now; where the system does not tell that (macOS), the most it
    has been, and nothing on Windows.
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
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
