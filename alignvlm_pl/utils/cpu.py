"""How torch computes on a CPU: what OpenMP threads do while they wait, and what becomes of memory."""

import ctypes
import os
import sys
from ctypes.util import find_library

# malloc.h of glibc: names of mallopt's parameters.
_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = 1, -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20
# Resolved at import, because in a forked process the dynamic loader may be locked.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


def thread_variables(*, alone: bool = False) -> dict[str, str]:
    """Return environment variables of threads, but those that are set, to be set before torch loads.

    Its OpenMP runtime reads them once. A thread that sleeps at once at each barrier wakes too late for the next; one
    that waits long makes a run several times slower as soon as another process wants its core. Waiting about as long as
    waking takes costs a busy machine nothing (`perf/cpu.py --busy`). Threads of a process that is `alone` wait long,
    each on a core of its own, so that another process takes time from one of them and never makes two share a core;
    not where `OMP_NUM_THREADS` is set, since several such processes would all be on the first cores.
    """
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",  # of other OpenMP runtimes than GNU's
        "GOMP_SPINCOUNT": "1000",
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for tensors of 2 MiB or more
    }
    if alone and "OMP_NUM_THREADS" not in os.environ:
        variables |= {"GOMP_SPINCOUNT": "100000", "OMP_PROC_BIND": "true"}
    return {name: value for name, value in variables.items() if name not in os.environ}


def allocator_variables() -> dict[str, str]:
    """Return environment variables of a program that shall have tcmalloc, to be set before it starts.

    Empty where it is not installed, or `LD_PRELOAD` is set. glibc walks a list of free blocks for each large tensor,
    which grows while batches of many lengths train; tcmalloc looks them up in a tree (`perf/cpu.py`).
    """
    if "LD_PRELOAD" in os.environ or sys.platform != "linux":
        return {}
    library = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    if library is None:
        return {}
    kept = {"TCMALLOC_RELEASE_RATE": "0"}  # freed memory stays with the process, as by `keep_freed_memory`
    return {"LD_PRELOAD": library} | {name: value for name, value in kept.items() if name not in os.environ}


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations, in this process and its forks; False with another C library.

    Else a training step on a CPU spends much of its time on page faults of large tensors. Small freed blocks join their
    neighbours at once (`M_MXFAST`): those that wait keep the space around them in pieces, of which there are more with
    each batch of another length, and a search for a large tensor passes them all (`perf/cpu.py`).
    """
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES), (_M_MXFAST, 0))
    return _mallopt is not None and all(_mallopt(name, value) == 1 for name, value in settings)
