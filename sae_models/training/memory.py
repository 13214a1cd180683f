"""Allocator settings of a training process."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed() -> None:
    """Make glibc's allocator keep freed memory.

    A step frees and allocates the same large tensors again. By default glibc returns each to the system, which must
    clear and map its pages anew: a tenth to a third of a step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(MMAP_THRESHOLD, LARGEST)
            libc.mallopt(TRIM_THRESHOLD, LARGEST)
