"""glibc's allocator, configured for training on a CPU."""

import ctypes

# malloc.h of glibc: names of mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20
# Resolved at import, because in a forked process the dynamic loader may be locked.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations, in this process and its forks; False with another C library.

    Else a training step on a CPU spends much of its time on page faults of large tensors (perf/allocator.py).
    """
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return _mallopt is not None and all(_mallopt(name, value) == 1 for name, value in settings)
