"""Keeps memory that was freed, so that a training step on CPU need not get it from the kernel again."""

import ctypes
import os
import platform

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
# A larger buffer that finds no gap would double the memory of the process.
LARGEST = 2**30


def keep_freed_memory() -> None:
    """Tells glibc's allocator to reuse freed memory; does nothing with other C libraries or if the user has set it up.

    Otherwise glibc returns every large buffer to the kernel, which then clears hundreds of megabytes in each training
    step. Buffers of more than a gigabyte are still returned. Call it before threads start: buffers of other arenas than
    the first are not kept.
    """
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, LARGEST)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
