"""Memory of large temporary tensors stays with the process, instead of going back to the system in every step.

glibc maps each large buffer anew and unmaps it when it is freed, so that a training step touches hundreds of thousands
of fresh pages, each of them a page fault.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of the two options, in malloc.h
NEVER = -1
MAPPED_FROM = 1 << 30  # bytes: what is larger still goes back when it is freed


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, for the whole process; on other systems nothing happens.

    Returns:
        Whether it did.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, NEVER))
