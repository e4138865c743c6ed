"""A training step of the embedded LLM with the C library's default allocator and with `keep_freed_memory`.

    python perf/allocator.py [--json] [--batch 4] [--length 200] [--rounds 3]

The setting belongs to a process, so each is measured in a process of its own, in turns; the ratio of the medians of the
steps is the result. With `--json` the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Before torch loads: threads that spin at barriers would slow whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NAMES = ("default", "kept")
_UNMEASURED = 2


def steps_s(options: argparse.Namespace) -> list[float]:
    """Return the wall times of the measured steps of this process in seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignvlm_pl.pretrained.smollm2 import ensure_smollm2
    from alignvlm_pl.utils.allocator import keep_freed_memory

    if options.child == "kept" and not keep_freed_memory():
        raise SystemExit("this C library has no mallopt: nothing to compare")
    model = AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, 4096, (options.batch, options.length))
    seconds = []
    for _ in range(options.steps + _UNMEASURED):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[_UNMEASURED:]


def main() -> int:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=200, help="tokens of a sequence; default 200")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each; default 3")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after two unmeasured")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(steps_s(options)))
        return 0
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(options.rounds):
        for name in NAMES:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds[name] += json.loads(done.stdout.splitlines()[-1])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    results = {f"{name}_s": round(median, 3) for name, median in medians.items()}
    results["kept_over_default"] = round(medians["kept"] / medians["default"], 3)
    print(f"{options.batch} x {options.length} tokens: {results}")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
