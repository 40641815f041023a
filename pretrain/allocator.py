"""Freed memory is kept for the next tensor instead of being given back to the system.

By default glibc maps large blocks afresh for every tensor and unmaps them after it, so each byte is
cleared and faulted in by the kernel before it is first written: a tenth of the time of labelling on
CPUs, and nearly half of performer-pytorch's at full length.
"""

import ctypes
from typing import Final

TRIM_THRESHOLD: Final = -1
MMAP_THRESHOLD: Final = -3
"""Parameters of glibc's `mallopt`, from malloc.h."""
ALL: Final = 1 << 30
"""Bytes from which blocks are mapped of their own, and freed memory is given back."""
OLD_MOST: Final = 32 << 20
"""The largest threshold that older versions of glibc accept."""


def keep_freed_memory() -> bool:
    """Keep what this process frees, for good; True if its C library can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = libc.mallopt(MMAP_THRESHOLD, ALL) or libc.mallopt(MMAP_THRESHOLD, OLD_MOST)
    return bool(libc.mallopt(TRIM_THRESHOLD, ALL) and kept)
