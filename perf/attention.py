"""Forward and backward of the embedded LLM under `eager` and `sdpa` attention, for batches like the demo's.

    python perf/attention.py [--json] [--batch 4] [--length 200] [--rounds 6]

The two alternate on the same right-padded batch, under bf16 autocast; the ratio of their medians is the result.
`configs/model/embedded.yaml` takes `eager` where the ratio is above 1. With `--json` the last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignvlm_pl.pretrained.smollm2 import ensure_smollm2

NAMES = ("eager", "sdpa")


def step_s(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the wall time of one forward and backward in seconds."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> int:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=200, help="tokens of the longest sequence; default 200")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each, after two unmeasured")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.float32)
    ids = torch.randint(0, 4096, (options.batch, options.length))
    lengths = torch.linspace(0.75, 1.0, options.batch) * options.length
    mask = (torch.arange(options.length) < lengths[:, None]).long()
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(options.rounds + 2):
        for name in NAMES:
            model.set_attn_implementation(name)
            seconds[name].append(step_s(model, ids, mask))
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    results = {f"{name}_s": round(median, 3) for name, median in medians.items()}
    results["sdpa_over_eager"] = round(medians["sdpa"] / medians["eager"], 3)
    print(f"{options.batch} x {options.length} tokens, torch {torch.__version__}: {results}")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
