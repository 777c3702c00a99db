"""Keeps memory that was freed, so that a training step on CPU need not get it from the kernel again."""

import ctypes
import os
import platform

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's allocator to reuse freed memory; does nothing with other C libraries or if the user has set it up.

    Otherwise glibc returns every large buffer to the kernel, which then clears hundreds of megabytes in each training
    step. Call it before threads start: buffers of other arenas than the first are not kept.
    """
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
