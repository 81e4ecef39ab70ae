"""Memory that is freed stays with the process, to be used again without the kernel clearing it first.

By default glibc returns every large block at once, and each next one costs a page fault for 4 KB of it: on two cores an
evaluation spent a tenth of its time there (docs/benchmarks/evaluation.md).
"""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
KEPT_BYTES = 2**31 - 1  # the largest that mallopt takes


def keep_freed_memory() -> None:
    """Do so from now on, in this process; nothing happens where the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, 2**26)):
            mallopt(parameter, value)
