"""Time and memory of the Align operator's back-ends over those of its seven matrix products alone.

    python perf/align.py [--json] [--tokens 729] [--many 6561] [--width 2048] [--vocab 128256] [--kept 3400]
                         [--rounds 3] [--dtypes bf16 fp32 mixed] [--device cpu]

Products, eager, chunked (and triton on CUDA) are timed in turns, forward and backward with all gradients; ratios are of
the medians. The products write into arrays that are there already. Memory is the peak of what is allocated beyond
weights, inputs, output and their gradients; time is taken with freed memory kept, as in training on a CPU. `kept` rows
of head and table are timed with the table's rows looked up, and once more with their gradient scattered into one of the
whole table, as large as the table. `--many 0` leaves the large batch out. `mixed` is float32 weights under bfloat16
autocast, as one GPU and ddp train; its products have bfloat16 weights. With `--json` the last line is one JSON object:
the plain keys are the worst over the dtypes; `extra_gib_729` and `extra_gib_6561` are those of `--tokens` and `--many`,
without `mixed`, which holds the weights in bfloat16 as well.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import keep_freed_memory, thread_variables

os.environ.update(thread_variables())

import torch
from torch import Tensor

from alignvlm_pl.ops import AUTO, align

GIB = 2**30
_M_MMAP_THRESHOLD, _M_PERTURB = -3, -6
"""Of glibc's mallopt. With a fixed threshold, freed arrays are given back at once and do not blur a peak. What is
allocated gets filled and so is resident at once: else a gradient that is not written yet would hide what is in use
beside it, which happens where one chunk has all tokens, and not where there are several."""
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.bfloat16, torch.float32),
}
"""Dtype of the products, and of W2 and E_text."""
WORST = {
    "chunked_over_products": max,
    "eager_over_products": max,
    "triton_over_products": max,
    "extra_gib_729": max,
    "extra_gib_6561": max,
    "pruned_speedup": min,
    "pruned_into_table_speedup": min,
}


class Case:
    """Weights and inputs of one size and dtype; the norm is float32.

    Args:
        options: Of the command line.
        name: A key of `DTYPES`.
        tokens: Visual tokens.
    """

    def __init__(self, options: argparse.Namespace, name: str, tokens: int) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.dtype, own = DTYPES[name]
        width, rows = options.width, options.vocab
        self.hidden = self._filled(tokens, width)
        self.head, self.table = self._filled(rows, width).to(own), self._filled(rows, width).to(own)
        self.gain, self.bias = self._filled(rows).float(), self._filled(rows).float()
        self.upstream = self._filled(tokens, width)

    def _filled(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def leaves(self) -> list[Tensor]:
        """Everything with a gradient."""
        tensors = (self.hidden, self.head, self.gain, self.bias, self.table)
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def step(self, backend: str) -> None:
        """Forward and backward of a back-end."""
        _step(self.leaves(), self.upstream, backend)

    def pruned_step(self, kept: Tensor, *, into_table: bool) -> Callable[[], None]:
        """Forward and backward on some rows; W2 and the norm hold these alone, the table is the LLM's.

        Args:
            kept: Ids of the rows.
            into_table: Whether the gradient is scattered into one of the whole table, most of it zeros.
        """
        head, gain, bias = self.head[kept], self.gain[kept], self.bias[kept]

        def step() -> None:
            table = self.table.detach().requires_grad_(into_table)
            rows = table.index_select(0, kept)
            leaves = [t.detach().requires_grad_() for t in (self.hidden, head, gain, bias)]
            _step([*leaves, rows if into_table else rows.requires_grad_()], self.upstream, AUTO)

        return step

    def products(self) -> Callable[[], None]:
        """The seven products, and nothing between them."""
        scores = self.hidden.new_empty((len(self.hidden), len(self.head)))
        weights, narrow, large = (
            torch.empty_like(scores),
            torch.empty_like(self.hidden),
            torch.empty_like(self.head, dtype=self.dtype),
        )
        weights.fill_(1e-4)
        head, table = self.head.to(self.dtype), self.table.to(self.dtype)

        def run() -> None:
            torch.mm(self.hidden, head.t(), out=scores)
            torch.mm(weights, table, out=narrow)
            torch.mm(self.hidden, head.t(), out=scores)
            torch.mm(self.upstream, table.t(), out=scores)
            torch.mm(weights.t(), self.upstream, out=large)
            torch.mm(weights, head, out=narrow)
            torch.mm(weights.t(), self.hidden, out=large)

        return run


def _step(leaves: list[Tensor], upstream: Tensor, backend: str) -> None:
    hidden, head, gain, bias, table = leaves
    with torch.autocast(hidden.device.type, hidden.dtype, enabled=head.dtype != hidden.dtype):
        embeds: Any = align(hidden, head, gain, bias, table, backend=backend).embeds
    embeds.backward(upstream)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_gib(case: Case, backend: str) -> float:
    """Peak of memory over a step, beyond what is there before, the output and the gradients."""
    leaves = case.leaves()
    known = sum(t.numel() * t.element_size() for t in leaves) + case.upstream.nbytes
    # Code that is loaded or made at the first call is not the operator's memory.
    few = [leaves[0].detach()[:8].requires_grad_(), *(t.detach().requires_grad_() for t in leaves[1:])]
    step = partial(_step, leaves, case.upstream, backend)
    if case.device.type == "cuda":
        _step(few, case.upstream[:8], backend)
        del few
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before - known) / GIB
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    libc.mallopt(_M_PERTURB, 1)
    _step(few, case.upstream[:8], backend)
    del few
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _status("VmRSS")
    step()
    libc.mallopt(_M_PERTURB, 0)
    return (_status("VmHWM") - before - known) / GIB


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def backends_of(options: argparse.Namespace) -> list[str]:
    """The back-ends that run on the device."""
    return ["eager", "chunked"] + (["triton"] if torch.device(options.device).type == "cuda" else [])


def memory(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Memory of each back-end, and of the chunks with many tokens."""
    case = Case(options, name, options.tokens)
    results = {f"{backend}_extra_gib": extra_gib(case, backend) for backend in backends_of(options)}
    results["extra_gib_729"] = results["chunked_extra_gib"]
    del case
    if options.many:
        results["extra_gib_6561"] = extra_gib(Case(options, name, options.many), "chunked")
    return results


def times(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Seconds of everything, in turns, and their ratios."""
    case, backends = Case(options, name, options.tokens), backends_of(options)
    kept = torch.randperm(options.vocab, device=case.device)[: options.kept].sort().values
    runs: dict[str, Callable[[], None]] = {backend: partial(case.step, backend) for backend in backends}
    runs |= {
        "products": case.products(),
        "pruned": case.pruned_step(kept, into_table=False),
        "pruned_into_table": case.pruned_step(kept, into_table=True),
    }
    taken: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(options.rounds + 1):
        for key, run in runs.items():
            found = seconds(run, case.device)
            if turn:  # the first is not counted: buffers, threads, compiled kernels
                taken[key].append(found)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    work = 14 * options.tokens * options.width * options.vocab
    return {
        **{f"{key}_s": median for key, median in medians.items()},
        **{f"{key}_over_products": medians[key] / medians["products"] for key in backends},
        "products_tflops": work / medians["products"] / 1e12,
        "pruned_speedup": medians["chunked"] / medians["pruned"],
        "pruned_into_table_speedup": medians["chunked"] / medians["pruned_into_table"],
    }


def main() -> int:
    """Print the results of each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tokens", type=int, default=729, help="visual tokens; default 729, a tile of SigLIP")
    parser.add_argument("--many", type=int, default=6561, help="tokens of the large batch, 0 for none")
    parser.add_argument("--width", type=int, default=2048, help="width of the LLM; default 2048")
    parser.add_argument("--vocab", type=int, default=128256, help="rows of the vocabulary; default 128256")
    parser.add_argument("--kept", type=int, default=3400, help="rows of the pruned vocabulary; default 3400")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured; default 3")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{options.tokens} tokens, D {options.width}, V {options.vocab}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads on {options.device}")
    found: dict[str, dict[str, float]] = {name: {} for name in options.dtypes}
    for measure in (memory, times):
        if measure is times and options.device == "cpu":
            keep_freed_memory()  # as training does; only now, because memory that is kept would hide a peak
        for name in options.dtypes:
            results = measure(options, name)
            found[name] |= results
            for key, value in results.items():
                print(f"  {name} {key:28s} {value:10.3f}", flush=True)
    if options.json:
        worst = {
            key: choose(values)
            for key, choose in WORST.items()
            if (values := [r[key] for name, r in found.items() if key in r and (name != "mixed" or "gib" not in key)])
        }
        each = {f"{key}_{name}": value for name, results in found.items() for key, value in results.items()}
        print(json.dumps({key: round(value, 4) for key, value in {**worst, **each}.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
