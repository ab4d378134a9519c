"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step, in place of giving it back; false where there is no glibc.

    Large tensors are mapped for themselves by default and unmapped when freed, so that on the CPU every
    step asks the kernel for all its pages again. Peak memory stays; after the peak it is not given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # It returns 1 where a setting was taken.
    return bool(mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1)
