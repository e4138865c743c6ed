"""What happens to freed memory and to waiting threads, seen from a process of its own."""

import os
import re
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from alignvlm_pl.utils.cpu import allocator_variables

ROOT = Path(__file__).parents[2]
ALLOCATOR = ("LD_PRELOAD", "TCMALLOC_RELEASE_RATE")
PROGRAM = """
import ctypes, sys
from alignvlm_pl.utils.cpu import keep_freed_memory

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))

if "keep" in sys.argv and not keep_freed_memory():
    raise SystemExit(77)
class Counts(ctypes.Structure):  # struct mallinfo of glibc's malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.mallinfo.restype = ctypes.c_void_p, [ctypes.c_void_p], Counts
before, block = resident_mb(), libc.malloc(200 << 20)
ctypes.memset(block, 1, 200 << 20)
libc.free(block)
left = resident_mb() - before
small = [libc.malloc(64) for _ in range(1000)]
apart = libc.mallinfo().smblks
for block in small:
    libc.free(block)
print(left, libc.mallinfo().smblks - apart)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_stays_with_the_process_and_joins():
    def left_mb_and_blocks_apart(*words: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip("the C library is not glibc")
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()]

    (given_back, apart), (kept, joined) = left_mb_and_blocks_apart(), left_mb_and_blocks_apart("keep")
    assert given_back < 50 < 150 < kept
    assert joined <= 0 < apart


def openmp(program: str, **variables: str) -> dict[str, str]:
    """Variables of OpenMP as its runtime read them, in a process that runs `program`."""
    changed = ("OMP_", "GOMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(changed)}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **variables}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"(\w+) = '([^']*)'", done.stderr))
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("torch has another OpenMP runtime than GNU's")
    return found


@pytest.mark.parametrize(
    ("command", "set_already", "rounds", "bound"),
    [
        ("fit", {}, "1000", "FALSE"),
        ("read", {}, "1000", "FALSE"),
        ("demo", {}, "100000", "TRUE"),
        ("box", {"GOMP_SPINCOUNT": "7"}, "7", "TRUE"),
        # Whoever sets the number of threads may run several processes, which must not share one core.
        ("demo", {"OMP_NUM_THREADS": "1"}, "1000", "FALSE"),
    ],
)
def test_commands_say_how_threads_wait_before_torch_loads(command, set_already, rounds, bound):
    program = f"import alignvlm_pl.cli as cli\ntry: cli.main(['{command}', '--help'])\nexcept SystemExit: import torch"
    found = openmp(program, **set_already)
    assert (found["GOMP_SPINCOUNT"], found["OMP_PROC_BIND"]) == (rounds, bound)


def starts_of(command: str, **variables: str) -> list[list[str]]:
    """`LD_PRELOAD` and tcmalloc's rate at each start of a command, where tcmalloc is said to be installed."""
    program = """
import os, runpy, sys
from alignvlm_pl.utils import cpu
cpu.find_library = {"tcmalloc": "libtcmalloc.so.4"}.get
print("started", os.environ.get("LD_PRELOAD", "-"), os.environ.get("TCMALLOC_RELEASE_RATE", "-"))
runpy.run_path("cli.py", run_name="__main__")
"""
    command = [sys.executable, "-u", "-c", program, command, "--help"]
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("started")]


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is read by Linux's loader")
def test_demo_and_box_start_with_tcmalloc_unless_the_user_chose_another_allocator():
    assert starts_of("demo") == [["-", "-"], ["libtcmalloc.so.4", "0"]]
    assert starts_of("box", TCMALLOC_RELEASE_RATE="1") == [["-", "1"], ["libtcmalloc.so.4", "1"]]
    assert starts_of("fit") == [["-", "-"]]
    assert starts_of("demo", LD_PRELOAD="libm.so.6") == [["libm.so.6", "-"]]


@pytest.mark.skipif(find_library("tcmalloc_minimal") is None, reason="libtcmalloc-minimal4 is not installed")
def test_tcmalloc_keeps_freed_memory(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    # As it comes, it gives a freed block back about every 2 GB.
    again = "for _ in range(30): libc.free(libc.malloc(200 << 20))\nprint(resident_mb() - before)"
    command = [sys.executable, "-c", f"{PROGRAM}\n{again}"]
    environment = os.environ | allocator_variables()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 150
