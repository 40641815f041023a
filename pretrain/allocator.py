"""Freed memory is kept for the next tensor instead of being given back to the system.

By default glibc maps large blocks afresh for every tensor and unmaps them after it, so each byte is
cleared and faulted in by the kernel before it is first written: a tenth of the time of labelling on
CPUs, and nearly half of performer-pytorch's at full length.
"""

import ctypes
from typing import Final

TRIM_THRESHOLD: Final = -1
MMAP_MAX: Final = -4
"""Parameters of glibc's `mallopt`, from malloc.h."""
NEVER: Final = -1
"""As a threshold: no amount of free memory is given back."""


def keep_freed_memory() -> bool:
    """Keep what this process frees, for good; True if its C library can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, NEVER))
