"""A training step of the embedded LLM by how threads wait and memory is kept (`alignvlm_pl.utils.cpu`).

    python perf/cpu.py [--json] [--busy] [--settings default kept asleep shared held tcmalloc] [--batch 4] [--steps 40]

`default` changes nothing, `kept` keeps freed memory, as the others do; in `asleep` threads sleep at once at barriers,
`shared` is what every command sets, `held` and `tcmalloc` what `demo` and `box` set, without the allocator and with it.
With `--busy` another process keeps one core busy meanwhile.

The settings belong to a process, so each is measured in a process of its own, one after the other; batches have other
lengths in each step, and the median of the last half of the steps counts, as memory falls to pieces with time. The
ratios to the first setting are the result. With `--json` the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import allocator_variables, keep_freed_memory, thread_variables

NAMES = ("default", "kept", "asleep", "shared", "held", "tcmalloc")
LENGTHS = (90, 150)
"""Tokens of a sequence, from and to."""


def configure(name: str) -> None:
    """Apply the settings of `name` to this process, before torch loads."""
    if name == "asleep":
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if name in ("shared", "held", "tcmalloc"):
        os.environ.update(thread_variables(alone=name != "shared"))
    if name != "default" and not keep_freed_memory():
        raise SystemExit("this C library has no mallopt: nothing to compare")


def steps_s(options: argparse.Namespace) -> list[float]:
    """Return the wall times of the measured steps of this process in seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignvlm_pl.pretrained.smollm2 import ensure_smollm2

    model = AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    lengths = torch.randint(*LENGTHS, (options.steps,), generator=torch.Generator().manual_seed(0))
    seconds = []
    for length in lengths.tolist():
        ids = torch.randint(0, 4096, (options.batch, length))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[options.steps // 2 :]


@contextmanager
def neighbour(*, busy: bool) -> Iterator[None]:
    """Keep a core busy meanwhile, if `busy`."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> int:
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="steps of a process; default %(default)s")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        configure(options.child)
        print(json.dumps(steps_s(options)))
        return 0
    medians, allocator = {}, allocator_variables()
    if not allocator and "tcmalloc" in options.settings:
        print("not measured: tcmalloc, which is not installed, or LD_PRELOAD is set")
        options.settings = [name for name in options.settings if name != "tcmalloc"] or ["default"]
    with neighbour(busy=options.busy):
        for name in options.settings:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            environment = os.environ | (allocator if name == "tcmalloc" else {})
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            medians[name] = statistics.median(json.loads(done.stdout.splitlines()[-1]))
    first, *others = options.settings
    results = {f"{name}_s": round(median, 3) for name, median in medians.items()}
    results |= {f"{name}_over_{first}": round(medians[name] / medians[first], 3) for name in others}
    print(f"{options.batch} x {LENGTHS[0]} to {LENGTHS[1]} tokens: {results}")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
