"""How a training process keeps memory."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed() -> None:
    """Lets this process's allocator (glibc) keep what is freed.

    A step frees and allocates the same large tensors again. By default each goes back to the system, which then clears
    and maps its pages anew: a tenth to a third of a step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(MMAP_THRESHOLD, LARGEST)
            libc.mallopt(TRIM_THRESHOLD, LARGEST)
