"""The C library's memory, set up for training on a CPU."""

import ctypes

# malloc.h of glibc: names of mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20
# Looked up here and not where it is called: in a forked process, the loader of libraries may be locked for ever.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation, in this process and those it forks.

    By default each large tensor is mapped anew and given back when it is freed, so that a training step on a CPU
    spends much of its time on page faults (perf/allocator.py measures it). The price: memory once used stays with
    the process.

    Returns:
        Whether it took effect; not where the C library is another one.
    """
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return _mallopt is not None and all(_mallopt(name, value) == 1 for name, value in settings)
