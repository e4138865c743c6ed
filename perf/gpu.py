"""The first ten minutes on a GPU: is everything right, how fast is it, how much memory does it take.

    python perf/gpu.py [--out docs/results/gpu.md] [--only parity align ...] [--rounds 5] [--json]
    python perf/gpu.py --device cpu --size tiny          # does the script itself run

Parts, each in a process of its own on a GPU, so that a crash, a hang or a lack of memory in one leaves the others:

    parity      ALIGN's back-ends against float64, at the sizes of the three LLMs
    align       its rate beside those of its own products and of a square product, by weights and budget
    rows        the Triton kernels alone, by shape of launch
    step        forward and backward of the whole model: time, MFU, peak memory; waits for the device
    attention   one layer on a packed row, by back-end
    loss        cross entropy through the head, by back-end
    fit         `fit` over a bare loop (perf/train_step.py)

What fails is written down as the result of its case. With `--json` the last line is one JSON object. The page has card,
driver, versions and date; on a CPU none is written unless `--out` says so.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Whether there is a GPU is asked without starting CUDA, which a forked process could not use any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

import torch
import train_step
from torch import Tensor

from alignvlm_pl.models.build import ModelSpec, build_config, build_processor
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.models.sequences import PACKABLE_ATTENTIONS, packed_arguments
from alignvlm_pl.ops import align
from alignvlm_pl.ops.chunked import align_chunked
from alignvlm_pl.ops.linear_cross_entropy import head_losses
from alignvlm_pl.preprocessing.batch import supervised_positions
from alignvlm_pl.training.flops import count_pairs, meta_model, peak_flops, stage_work
from alignvlm_pl.training.memory import CARD, CONTEXT, MicroBatch, step_memory
from alignvlm_pl.training.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/gpu.md"
PACKAGES = ("torch", "transformers", "lightning", "triton", "liger-kernel", "flash-attn", "numpy")
Values = dict[str, float | str]


@dataclass(frozen=True)
class Size:
    """Sizes of all parts.

    Attributes:
        vocab: Rows V of the vocabulary.
        kept: Rows of a pruned one; not a multiple of 16, on purpose.
        widths: Widths D of the LLMs.
        few: Visual tokens of the parity cases.
        page: Visual tokens of a page.
        square: Rows and columns of the square product.
        model: `--model` of perf/train_step.py.
        tiles: Tiles of the training steps.
        text: Text tokens of a step, half of them supervised.
        packed: Tokens of a packed row.
        document: Tokens of each of its documents.
        supervised: Positions of the loss.
        steps: Optimizer steps of a round of `fit`.
    """

    vocab: int
    kept: int
    widths: tuple[int, ...]
    few: int
    page: int
    square: int
    model: str
    tiles: tuple[int, ...]
    text: int
    packed: int
    document: int
    supervised: int
    steps: int


SIZES = {
    "paper": Size(128256, 3433, (2048, 3072, 4096), 131, 6561, 8192, "paper", (1, 9), 512, 16384, 2048, 2048, 10),
    "tiny": Size(515, 101, (16,), 7, 33, 64, "small", (2,), 16, 64, 16, 12, 1),
}


class Bench:
    """What the parts share: options, sizes and the device's clock and memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, SIZES[options.size]
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self._model: Model | None = None

    def model(self, tiles: int) -> "Model":
        """The model with a batch of so many tiles; kept for the next case of the part."""
        if self._model is None or self._model.tiles != tiles:
            self._model = None  # before the next one takes memory
            self._model = Model(self, tiles)
        return self._model

    def ms(self, run: Callable[[], Any]) -> float:
        """Median of the wall time of a call, in milliseconds, after two calls that do not count."""
        taken = []
        for turn in range(self.options.rounds + 2):
            started = train_step.now(self.device)
            run()
            if turn > 1:
                taken.append(1e3 * (train_step.now(self.device) - started))
        return statistics.median(taken)

    def peak_gib(self, run: Callable[[], Any]) -> Values:
        """Peak of a call beyond what is allocated before it, in GiB; nothing on a CPU."""
        if not self.cuda:
            return {}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return {"peak GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}

    def filled(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, device=self.device).mul_(scale).to(dtype)

    def autocast(self) -> Any:
        """The autocast of `bf16-mixed`."""
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def kernels(self) -> tuple[str, ...]:
        """The back-ends of ALIGN that are compared."""
        return ("chunked", "triton") if self.cuda else ("chunked",)


Case = tuple[str, Callable[[], Values]]
"""Name of a case, and what measures it."""


def parity(bench: Bench) -> Iterator[Case]:
    """ALIGN against its reference in float64: largest relative difference of output and gradients."""
    size = bench.size
    shapes = [(width, size.vocab, size.few) for width in size.widths]
    shapes += [(size.widths[0], size.kept, size.few), (size.widths[0], size.kept, 1)]
    for width, rows, tokens in shapes:
        for backend in bench.kernels():
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{backend}, {str(dtype)[6:]}, D {width}, V {rows}, {tokens} tokens"
                yield name, partial(_difference, bench, width, rows, tokens, backend, dtype)


def _difference(bench: Bench, width: int, rows: int, tokens: int, backend: str, dtype: torch.dtype) -> Values:
    torch.manual_seed(0)
    tensors = [bench.filled(tokens, width), bench.filled(rows, width, scale=0.02), 1 + bench.filled(rows, scale=0.1)]
    tensors += [bench.filled(rows, scale=0.1), bench.filled(rows, width, scale=0.02)]
    tensors, upstream = [tensor.to(dtype) for tensor in tensors], bench.filled(tokens, width).to(dtype)
    found = []
    for name, own in (("eager", torch.float64), (backend, dtype)):
        leaves = [tensor.to(own).requires_grad_() for tensor in tensors]
        out: Any = align(*leaves, backend=name).embeds
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(own))])
        del leaves, out
    exact, rounded = found
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True))
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    return {"difference": worst, "verdict": "as expected" if worst < bound else f"TOO LARGE, expected < {bound}"}


def align_rates(bench: Bench) -> Iterator[Case]:
    """Forward and backward of ALIGN, on the visual tokens of a page."""
    size, side = bench.size, bench.size.square
    yield f"square product of {side}, bf16", partial(_square, bench, side)
    for width in size.widths:
        yield f"its seven products alone, bf16, D {width}", partial(_products, bench, width)
        for weights in (torch.bfloat16, torch.float32):
            for backend in bench.kernels():
                for budget in (None, 376 << 20, 1 << 30):
                    if budget is not None and (backend, width) != (bench.kernels()[-1], size.widths[0]):
                        continue
                    known = "default budget" if budget is None else f"{budget >> 20} MiB"
                    name = f"{backend}, {str(weights)[6:]} weights, D {width}, {known}"
                    yield name, partial(_align, bench, width, weights, backend, budget)


def _square(bench: Bench, side: int) -> Values:
    left, right = (bench.filled(side, side, dtype=torch.bfloat16) for _ in range(2))
    taken = bench.ms(lambda: left @ right)
    return {"ms": taken, "TFLOP/s": 2 * side**3 / taken / 1e9}


def _work(bench: Bench, width: int) -> float:
    return 14.0 * bench.size.page * width * bench.size.vocab


def _products(bench: Bench, width: int) -> Values:
    size, chunk = bench.size, min(bench.size.page, 2304)
    hidden, narrow = (bench.filled(chunk, width, dtype=torch.bfloat16) for _ in range(2))
    head, large = (bench.filled(size.vocab, width, dtype=torch.bfloat16) for _ in range(2))
    scores = bench.filled(chunk, size.vocab, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(3):
            torch.mm(hidden, head.t(), out=scores)
        for _ in range(2):
            torch.mm(scores, head, out=narrow)
            torch.mm(scores.t(), hidden, out=large)

    taken = bench.ms(run) * size.page / chunk
    return {"ms": taken, "TFLOP/s": _work(bench, width) / taken / 1e9}


def _align(bench: Bench, width: int, weights: torch.dtype, backend: str, budget: int | None) -> Values:
    size, kernels = bench.size, "triton" if backend == "triton" else "torch"
    hidden, upstream = (bench.filled(size.page, width, dtype=torch.bfloat16) for _ in range(2))
    head, table = (bench.filled(size.vocab, width, dtype=weights, scale=0.02) for _ in range(2))
    gain, bias = torch.ones(size.vocab, device=bench.device), torch.zeros(size.vocab, device=bench.device)
    leaves = [tensor.requires_grad_() for tensor in (hidden, head, gain, bias, table)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with bench.autocast():
            out = align_chunked(*leaves, eps=1e-5, budget=budget, kernels=kernels).embeds
        assert out is not None, "a table was given"
        out.backward(upstream)

    taken = bench.ms(step)
    return {"ms": taken, "TFLOP/s": _work(bench, width) / taken / 1e9, **bench.peak_gib(step)}


def rows(bench: Bench) -> Iterator[Case]:
    """Norm and softmax of rows of scores, without the products: time by columns of a block and warps of a program."""
    if not bench.cuda:
        yield "Triton kernels", partial(_skip, "needs a CUDA device")
        return
    for block, warps in ((4096, 8), (4096, 16), (8192, 16), (8192, 32), (2048, 8)):
        for columns in (bench.size.vocab, bench.size.kept, bench.size.kept // 64 * 64):
            name = f"{columns} columns, blocks of {block}, {warps} warps"
            yield name, partial(_kernels, bench, columns, block, warps)


def _kernels(bench: Bench, columns: int, block: int, warps: int) -> Values:
    from alignvlm_pl.ops import norm_softmax_triton as kernels
    from alignvlm_pl.ops.norm_softmax import NormGradients, VocabularyNorm

    kernels._ROW_BLOCK, kernels._ROW_WARPS = block, warps
    count = 2304
    scores, upstream = (bench.filled(count, columns, dtype=torch.bfloat16) for _ in range(2))
    gain, bias = torch.ones(columns, device=bench.device), torch.zeros(columns, device=bench.device)
    norm, total = VocabularyNorm(gain, bias, 1e-5), NormGradients(torch.zeros_like(gain), torch.zeros_like(bias))
    forward = bench.ms(lambda: kernels.norm_softmax_(scores, norm, None))
    backward = bench.ms(lambda: kernels.norm_softmax_backward_(scores, upstream, norm, total, None, None))
    once = scores.nbytes / 1e6  # in MB, so that MB / ms is GB / s
    return {
        "forward ms": forward,
        "forward GB/s of one read and one write": 2 * once / forward,
        "backward ms": backward,
        "backward GB/s of two reads and two writes": 4 * once / backward,
    }


def _skip(reason: str) -> Values:
    return {"skipped": reason}


def step(bench: Bench) -> Iterator[Case]:
    """Forward and backward of vision tower, ALIGN and LLM, one sample, all parts trained, without an optimizer.

    Peak memory is beyond the weights; beside it that of `alignvlm_pl/training/memory.py`.
    """
    for tiles in bench.size.tiles:
        for weights in (torch.float32, torch.bfloat16):
            kind = (
                "float32 weights (one GPU, ddp)" if weights == torch.float32 else "bfloat16 weights (as FSDP2 gathers)"
            )
            for padded in (False, True):
                name = f"{tiles} tiles, {kind}{', one padded position in the mask' if padded else ''}"
                yield name, partial(_step, bench, tiles, weights, padded)
    yield f"waits for the device, {bench.size.tiles[-1]} tiles", partial(_waits, bench)


class Model:
    """The model with random weights and one batch of a sample."""

    def __init__(self, bench: Bench, tiles: int) -> None:
        self.tiles = tiles
        with tempfile.TemporaryDirectory() as folder:
            spec = ModelSpec(**train_step.write_spec(Path(folder), model=bench.size.model, tiles=tiles))
            self.config = build_config(spec, image_token_id=build_processor(spec).image_token_id)
        with bench.device:
            self.model = AlignVLMForConditionalGeneration(self.config).train()
        visual, text = tiles * self.config.tokens_per_tile, bench.size.text
        tiling = self.config.tiling
        ids = torch.randint(0, 250, (1, visual + text), device=bench.device)
        ids[:, :visual] = self.config.image_token_id
        labels = torch.full_like(ids, -100)
        labels[:, -text // 2 :] = ids[:, -text // 2 :]
        self.inputs: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            # As a collator gives them, so that the device is not waited for.
            "visual_positions": torch.arange(visual, device=bench.device),
            "supervised_positions": supervised_positions(labels),
            "pixel_values": torch.rand(tiles, 3, tiling["tile_height"], tiling["tile_width"], device=bench.device)
            .mul_(2)
            .sub_(1),
            "num_tiles": torch.tensor([tiles], device=bench.device),
            "use_cache": False,
        }
        stage, tokens = Stage(name="perf", lr_vision=1e-6, lr_connector=1e-6, lr_llm=1e-6), visual + text
        self.work = stage_work(self.config, stage).total(
            tiles=tiles, tokens=tokens, pairs=count_pairs([tokens]), supervised=text // 2
        )
        batch = MicroBatch(rows=1, tokens=tokens, tiles=tiles, supervised=text // 2)
        card = torch.cuda.get_device_properties(bench.device).total_memory if bench.cuda else CARD
        counted = step_memory(meta_model(self.config, stage), stage, batch, card=card).total() - CONTEXT
        # The weights are there before, and AdamW's two moments are not: 12 of the 16 bytes of a parameter.
        self.counted_gib = (counted - 12 * sum(p.numel() for p in self.model.parameters())) / 2**30

    def train(self, bench: Bench) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        with bench.autocast():
            loss = self.model(**self.inputs).loss
        loss.backward()


def _step(bench: Bench, tiles: int, weights: torch.dtype, padded: bool) -> Values:
    made = bench.model(tiles)
    made.model.to(weights)
    made.inputs["attention_mask"] = None
    if padded:
        made.inputs["attention_mask"] = torch.ones_like(made.inputs["input_ids"])
        made.inputs["attention_mask"][:, -1] = 0
    taken = bench.ms(lambda: made.train(bench))
    found: Values = {"ms": taken, "TFLOP": made.work / 1e12, "TFLOP/s": made.work / taken / 1e9}
    if peak := peak_flops(bench.device):
        found["MFU %"] = 100 * made.work / taken * 1e3 / peak
    if weights == torch.float32:
        found["counted GiB"] = made.counted_gib
    made.model.zero_grad(set_to_none=True)
    return {**found, **bench.peak_gib(lambda: made.train(bench))}


def _waits(bench: Bench) -> Values:
    """Places where a forward and backward wait for the device."""
    if not bench.cuda:
        return _skip("needs a CUDA device")
    made = bench.model(bench.size.tiles[-1])
    made.inputs["attention_mask"] = None
    made.train(bench)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made.train(bench)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message).lower())
    return {"waits": sum(where.values()), "at": ", ".join(f"{n} x {place}" for place, n in where.items()) or "none"}


def attention(bench: Bench) -> Iterator[Case]:
    """Forward and backward of one layer of the LLM on a packed row."""
    for name in PACKABLE_ATTENTIONS:
        yield f"{name}, {bench.size.packed} tokens", partial(_attention, bench, name)


def _attention(bench: Bench, name: str) -> Values:
    from transformers import AutoModel

    size = bench.size
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(**train_step.write_spec(Path(folder), model=size.model, tiles=1))
        config = spec.llm.load_config()
    config.num_hidden_layers = 1
    with bench.device:
        decoder = AutoModel.from_config(config).to(torch.bfloat16).train()
    decoder.set_attn_implementation(name)
    embeds = bench.filled(1, size.packed, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    segments = torch.arange(size.packed, device=bench.device)[None] // size.document + 1

    def run() -> None:
        arguments = packed_arguments(decoder, embeds, segments)
        decoder(inputs_embeds=embeds, **arguments).last_hidden_state.float().square().mean().backward()

    return {"ms a layer": bench.ms(run), **bench.peak_gib(run)}


def loss(bench: Bench) -> Iterator[Case]:
    """Forward and backward of the cross entropy through the LM head, float32 weights under autocast."""
    for name in ("plain", "chunked", "liger"):
        yield f"{name}, {bench.size.supervised} positions, V {bench.size.vocab}", partial(_loss, bench, name)


def _loss(bench: Bench, name: str) -> Values:
    size, width = bench.size, bench.size.widths[0]
    with bench.device:
        head = torch.nn.Linear(width, size.vocab, bias=False)
    hidden = bench.filled(size.supervised, width, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, size.vocab, (size.supervised,), device=bench.device)

    def run() -> None:
        head.weight.grad = hidden.grad = None
        with bench.autocast():
            total = head_losses(hidden, targets, head, backend=name).sum()
        total.backward()

    return {"ms": bench.ms(run), **bench.peak_gib(run)}


def fit(bench: Bench) -> Iterator[Case]:
    """`fit` with all its callbacks over a bare loop on the same batches, one sample a step."""
    for tiles in bench.size.tiles:
        yield f"{tiles} tiles", partial(_fit, bench, tiles)


def _fit(bench: Bench, tiles: int) -> Values:
    if not bench.cuda and not bench.options.fit:
        return _skip("perf/train_step.py runs it on a CPU")
    device = "cuda" if bench.cuda else "cpu"
    command = [sys.executable, str(ROOT / "perf/train_step.py"), "--json", "--device", device]
    command += ["--model", bench.size.model, "--tiles", str(tiles), "--batch_size", "1", "--strategies", "auto"]
    command += ["--steps", str(bench.size.steps), "--rounds", str(bench.options.rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=0.9 * bench.options.part_seconds
    )
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if not any(name.endswith("fit_over_bare") for name in found):
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}")[-500:])
    prefix = f"{tiles}_tiles_auto_"
    names = ("fit_over_bare", "overhead_ms", "mfu", "memory_gib", "fit_tokens_per_s")
    return {name: found[prefix + name] for name in names if prefix + name in found}


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "parity": parity,
    "align": align_rates,
    "rows": rows,
    "step": step,
    "attention": attention,
    "loss": loss,
    "fit": fit,
}
AIMS = {
    "parity": "float32 below 2e-5, bfloat16 below 2e-2",
    "align": "at least 550 TFLOP/s with bfloat16 weights and 500 with float32 on an H100 or H200, D 2048",
    "step": "MFU of at least 45 % at 9 tiles; at most one wait; the padded position costs nothing in `fit`, "
    "which passes no mask",
    "fit": "fit_over_bare at least 0.97",
}


def measure(bench: Bench, part: str, report: Callable[[str, Values], None]) -> None:
    """Run the cases of a part; what one raises is its result."""
    for name, case in PARTS[part](bench):
        try:
            found = case()
        except Exception as error:  # the result of this case; the next ones run
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            found = {"failed": f"{kind}: {' '.join(str(error).split())[:300]}"}
            if bench.options.verbose:
                traceback.print_exc()
            del error
        report(name, found)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()


def _child(options: argparse.Namespace, part: str, pipe: Any) -> None:
    measure(Bench(options), part, lambda name, found: pipe.send((name, found)))
    pipe.send(None)


def measure_alone(
    options: argparse.Namespace,
    part: str,
    report: Callable[[str, Values], None],
    child: Callable[[argparse.Namespace, str, Any], None] = _child,
) -> None:
    """As `measure`, in a forked process: a crash of the device or of the process, or a hang, ends this part only."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(options, part, there))
    process.start()
    there.close()
    ended = time.monotonic() + options.part_seconds
    try:
        while here.poll(max(0.0, ended - time.monotonic())):
            if (got := here.recv()) is None:
                break
            report(*got)
        else:
            report("the rest", {"failed": f"not finished after {options.part_seconds} s"})
    except EOFError:
        process.join()
        report("the rest", {"failed": f"the process ended with status {process.exitcode}"})
    finally:
        process.kill()
        process.join()


def shown(found: Values) -> str:
    """One line of text for the values of a case."""
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in found.items())


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Card, driver, versions and date."""
    found = {"date": time.strftime("%Y-%m-%d"), "command": "python perf/gpu.py " + " ".join(sys.argv[1:])}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    for name, command in (("commit", ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]), ("card", query)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            found[name] = done.stdout.strip().replace("\n", "; ") or "unknown"
        except (OSError, subprocess.TimeoutExpired):
            found[name] = "unknown"
    if options.device == "cpu":
        found["card"] = f"none: {platform.processor() or platform.machine()}"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = torch.version.cuda or "none"
    found["Python"] = platform.python_version()
    return found


def page(known: dict[str, str], results: dict[str, dict[str, Values]]) -> str:
    """The page of results as Markdown."""
    lines = ["# Measured on a GPU", "", "Written by `perf/gpu.py`; see [README.md](README.md).", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in known.items())]
    for part, cases in results.items():
        about = " ".join((PARTS[part].__doc__ or "").split())
        lines += ["", f"## {part}", "", about + (f" Aim: {AIMS[part]}." if part in AIMS else "")]
        lines += ["", "| case | found |", "|---|---|"]
        lines += [f"| {name} | {shown(found).replace('|', '/')} |" for name, found in cases.items()]
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cuda = torch.cuda.device_count() > 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="paper" if cuda else "tiny")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    parser.add_argument("--rounds", type=int, default=5, help="times each case is measured")
    parser.add_argument("--part_seconds", type=float, default=240, help="time limit of a part on a GPU")
    parser.add_argument("--in_process", action="store_true", help="all parts in this process, for a debugger")
    parser.add_argument("--fit", action="store_true", help="run the part fit on a CPU too")
    parser.add_argument("--out", type=Path, help="page to write; default: docs/results/gpu.md, on a CPU none")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--verbose", action="store_true", help="print the tracebacks of cases that fail")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not cuda:
        raise SystemExit(f"--device {options.device}: there is no CUDA device here")
    if options.out is None and options.device != "cpu":
        options.out = PAGE
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print and write what they find; 1 if a case failed."""
    options = parse(argv)
    known, results = facts(options), dict[str, dict[str, Values]]()
    for part in options.only:
        cases = results[part] = {}

        def report(name: str, found: Values, part: str = part, cases: dict[str, Values] = cases) -> None:
            cases[name] = found
            print(f"{part:10s} {name}: {shown(found)}", flush=True)
            if options.out is not None:  # after every case, for a machine that is taken away
                options.out.write_text(page(known, results))

        if options.device == "cpu" or options.in_process:
            measure(Bench(options), part, report)
        else:
            measure_alone(options, part, report)
    if options.json:
        print(json.dumps({**known, **results}))
    return int(any("failed" in found for cases in results.values() for found in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
