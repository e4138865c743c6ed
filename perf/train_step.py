"""Tokens per second of `fit` over those of a bare torch loop; MFU and memory of a training step.

    python perf/train_step.py [--json] [--model small|paper] [--device cpu|cuda] [--tiles 1 9]
                              [--strategies auto ddp configs/cluster/fsdp.yaml] [--steps 10] [--rounds 6]
                              [--batch_size N] [--text 64]
    python perf/train_step.py --model embedded [--stages configs/stage/documents.yaml ...] [--masses 0.5 1.01]
                              [--weights FOLDER] [--connector FILE]

Every case (tiles x strategy) is a process that runs the real command line: `fit` with all its callbacks, on batches
that were made beforehand and stay in memory, so that the loader's speed is not measured (perf/loader.py does that).
With strategy auto, `--steps` optimizer steps of `fit` and as many of a bare loop over the same modules, batches and
optimizer take turns in that process; the ratio is the median over the rounds (target: at least 0.97). The bare loop is
forward, backward, clip, step. `--steps` is a multiple of `log_every_n_steps` (10), so that each round logs.
Checkpoints, evaluation and the start are not in it.

`small` is a random model for a CPU; `paper` is configs/model/llama3.2-1b.yaml with random weights and a byte tokenizer,
all parts trained, for one GPU. Strategies are names that `trainer.strategy` takes, or files for `--trainer`. MFU is
over the device's peak (alignvlm_pl/training/flops.py); on a CPU over the rate of a matrix product in the same
precision, `product_tflops`, measured at the start.

`embedded` is the demo's model and pages, and a case is a stage: seconds of its step, and operations a second, which do
not count what the stage leaves out (frozen parts, collapsed blanks). With `--masses` each stage runs with each
`connector.collapse.mass`; blanks are known to `--weights`, such as runs/demo/1-read/hf. There is no bare loop.

A case that fails is printed with its error, and the next one runs. With `--json` the last line is one JSON object, with
the errors under `failed`; the exit status is 1 if a ratio misses the target or a case failed.
"""

import argparse
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device

from alignvlm_pl.preprocessing.batch import Batch
from alignvlm_pl.training.flops import count_pairs
from alignvlm_pl.training.module import AlignVLMModule, loss_inputs
from callbacks.throughput import Throughput, peak_memory, run_tokens
from datamodules import WebDataModule

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.97
CUDA_STRATEGIES = ("auto", "ddp", str(ROOT / "configs/cluster/fsdp.yaml"))
TWO_PAGES = 100 << 30
"""Memory of a GPU from which two samples of the paper's model fit at nine tiles; below it one does."""
BATCHES = 4
"""Different batches, which come again and again."""
RESULT = "clock.json"


class CaseError(Exception):
    """A run of `fit` that failed, with what it wrote to stderr."""


class Recorded:
    """Batches in memory, without end."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[Batch]:
        return cycle(self.batches)


class RecordedDataModule(WebDataModule):
    """The training batches of shards, made once."""

    def train_dataloader(self) -> Any:
        """The first batches of the stream, in pinned memory where there is a GPU."""
        batches = list(islice(iter(super().train_dataloader()), BATCHES))
        return Recorded(batches)


class Clock(pl.Callback):
    """Time rounds of `fit`, and after each as many steps of a bare loop over the same modules.

    Args:
        steps: Optimizer steps of a round.
        rounds: Rounds that count; one more comes first, and does not.
        bare: Whether the bare loop runs; wrapped modules are not for it.
    """

    def __init__(self, steps: int, rounds: int, bare: bool = True) -> None:
        self.steps, self.rounds, self.bare = steps, rounds, bare
        self.found: list[dict[str, float]] = []
        self._since = 0.0
        self._amounts = dict.fromkeys(("tiles", "tokens", "pairs", "supervised"), 0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start with the first step."""
        if not self._since:
            self._since = now(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a round, take the time and let the bare loop run."""
        assert isinstance(pl_module, AlignVLMModule)
        self._amounts["tiles"] += sum(batch["tiles"])
        per_tile = pl_module.net.config.tokens_per_tile
        tokens = run_tokens(batch["tokens"], batch["tiles"], outputs.get("kept_tokens"), tokens_per_tile=per_tile)
        self._amounts["tokens"] += sum(tokens)
        self._amounts["pairs"] += count_pairs(tokens)
        self._supervised = outputs["document_supervised"].sum()
        if trainer.global_step % self.steps:
            return
        seconds = now(pl_module.device) - self._since
        found = {"fit_s": seconds, "steps": self.steps, **self._amounts}
        found["supervised"] = float(self._supervised) * self.steps  # all answers are of one length
        if self.bare:
            loader: Any = trainer.train_dataloader
            batches = islice(loader, self.steps)
            started = now(pl_module.device)
            for own in batches:
                bare_step(trainer, pl_module, own)
            found["bare_s"] = now(pl_module.device) - started
        self.found.append(found)
        self._amounts = dict.fromkeys(self._amounts, 0.0)
        self._since = now(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was found."""
        if not trainer.is_global_zero:
            return
        meter = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
        results = summary(self.found[1:], meter)
        results["memory_gib"] = peak_memory(pl_module.device) / 2**30
        (Path(trainer.default_root_dir) / RESULT).write_text(json.dumps(results))


def bare_step(trainer: pl.Trainer, module: AlignVLMModule, batch: Batch) -> None:
    """What a loop without a framework does for one batch."""
    optimizer, device = trainer.optimizers[0], module.device
    batch = move_data_to_device(batch, device)
    half = "bf16" in str(trainer.precision)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        loss = module.net(**loss_inputs(batch), labels=batch["labels"], use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(rounds: list[dict[str, float]], meter: Throughput) -> dict[str, float]:
    """Medians over the rounds."""
    names = ("tiles", "tokens", "pairs", "supervised")
    seconds = [found["fit_s"] for found in rounds]
    results = {
        "step_s": statistics.median(found["fit_s"] / found["steps"] for found in rounds),
        "fit_tokens_per_s": statistics.median(found["tokens"] / found["fit_s"] for found in rounds),
        "fit_tiles_per_s": statistics.median(found["tiles"] / found["fit_s"] for found in rounds),
    }
    if meter.work is not None:
        first = {name: rounds[0][name] for name in names}
        parts = meter.work.by_part(**first)
        rate = sum(parts.values()) / statistics.median(seconds)
        results["tflops_per_s"] = rate / 1e12
        results |= {f"{part}_work_share": own / sum(parts.values()) for part, own in parts.items()}
        attention = first["pairs"] * meter.work.attention
        results["attention_work_share"] = attention / sum(parts.values())
        if meter.peak is not None:
            results |= {"mfu": rate / meter.peak, "product_tflops": meter.peak / 1e12}
    if all("bare_s" in found for found in rounds):
        results["bare_tokens_per_s"] = statistics.median(f["tokens"] / f["bare_s"] for f in rounds)
        results["overhead_ms"] = 1000 * statistics.median((f["fit_s"] - f["bare_s"]) / f["steps"] for f in rounds)
        results["fit_over_bare"] = statistics.median(found["bare_s"] / found["fit_s"] for found in rounds)
    return results


def write_set(folder: Path, *, tiles: int, side: int, text: int, count: int) -> None:
    """Write samples with an image of `tiles` tiles and `text` letters of question and answer."""
    from PIL import Image

    from datamodules.shards.writer import ShardWriter

    rows = int(tiles**0.5) if int(tiles**0.5) ** 2 == tiles else 1
    buffer = io.BytesIO()
    Image.effect_noise((side * (tiles // rows), side * rows), 60).convert("RGB").save(buffer, "JPEG")
    with ShardWriter(folder, name=folder.name, source="made", license="none") as out:
        for _ in range(count):
            question = [{"type": "image", "index": 0}, {"type": "text", "text": "q" * (text // 2)}]
            answer = [{"type": "text", "text": "a" * (text // 2)}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.add({"messages": messages}, [buffer.getvalue()], ["jpg"])


def write_spec(folder: Path, *, model: str, tiles: int) -> dict[str, Any]:
    """Write the model's file; returns its specification."""
    import yaml

    from alignvlm_pl.models.tiny import tiny_spec, tiny_tokenizer

    tokenizer = folder / "tokenizer"
    if model == "paper":
        spec: dict[str, Any] = yaml.safe_load((ROOT / "configs/model/llama3.2-1b.yaml").read_text())["spec"]
        tiny_tokenizer().save_pretrained(tokenizer)
        for part in ("vision", "llm"):
            spec[part]["pretrained"] = None
        spec["llm"]["tokenizer"] = str(tokenizer)
        spec["chat_template"] = "chatml"  # the byte tokenizer has no control tokens of Llama
    else:
        spec = dataclasses.asdict(
            tiny_spec(
                tokenizer,
                vision={"width": 192, "layers": 6},
                llm={"width": 256, "layers": 6},
                tiling={"max_tiles": max(tiles, 1), "thumbnail": "none"},
            )
        )
    (folder / "model.yaml").write_text(yaml.safe_dump({"spec": spec}))
    return spec


def run_case(options: argparse.Namespace, folder: Path, *, tiles: int, strategy: str) -> dict[str, float]:
    """One case of a random model in a process of its own."""
    folder.mkdir()
    spec = write_spec(folder, model=options.model, tiles=tiles)
    size = options.batch_size
    write_set(
        folder / "set",
        tiles=tiles,
        side=spec["tiling"]["tile_height"],
        text=options.text,
        count=BATCHES * size,
    )
    trainer = ["--trainer", strategy] if strategy.endswith(".yaml") else [f"--trainer.strategy={strategy}"]
    words = [
        *("--model", str(folder / "model.yaml"), *trainer),
        *("--stage.name=perf", "--stage.lr_vision=1e-6", "--stage.lr_connector=1e-6", "--stage.lr_llm=1e-6"),
    ]
    return run_fit(options, folder, words, bare=strategy == "auto")


def run_stage(options: argparse.Namespace, folder: Path, *, stage: str, mass: float | None) -> dict[str, float]:
    """One stage of the embedded default on the demo's pages, in a process of its own."""
    from datamodules.prepare.synthetic import write_split

    folder.mkdir()
    count = BATCHES * options.batch_size
    write_split(folder / "set", split="train", num_documents=count, height=96, fault_share=0.4, processes=1)
    words = ["--model", str(ROOT / "configs/model/embedded.yaml"), "--stage", stage, "--stage.parent=null"]
    if options.connector:
        words += ["--connector", options.connector]
    if options.weights:
        words += ["--stage.init_from", options.weights]
    if mass is not None:
        words.append(f"--model.spec.connector.collapse.mass={mass}")
    return run_fit(options, folder, words, bare=False)


def run_fit(options: argparse.Namespace, folder: Path, words: list[str], *, bare: bool) -> dict[str, float]:
    """Run `fit` on the set in the folder; `words` are options of model, stage and strategy."""
    cuda, size = options.device == "cuda", options.batch_size
    clock = {"steps": options.steps, "rounds": options.rounds, "bare": bare}
    command = [
        *("fit", "--config", str(ROOT / "configs/base.yaml"), *words),
        *("--data", "train_step.RecordedDataModule", f"--data.init_args.train=[{folder / 'set'}]"),
        *(f"--data.init_args.batch_size={size}", "--data.init_args.num_workers=0"),
        *(f"--stage.global_batch_size={size}", f"--stage.max_steps={options.steps * (options.rounds + 1)}"),
        *("--trainer.devices=1", f"--trainer.accelerator={'gpu' if cuda else 'cpu'}"),
        f"--trainer.precision={options.precision}",
        *(
            "--trainer.limit_val_batches=0",
            "--trainer.num_sanity_val_steps=0",
            "--benchmark.at_stage_end=false",
        ),
        *("--checkpoint_every_n_steps=1000000", f"--run_dir={folder / 'run'}"),
        f"--trainer.callbacks={json.dumps([{'class_path': 'train_step.Clock', 'init_args': clock}])}",
    ]
    if not cuda:
        command.append(f"--throughput.peak_tflops={matmul_tflops(half='bf16' in options.precision)}")
    program = "import sys; from alignvlm_pl.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "perf")))}
    done = subprocess.run([sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CaseError(done.stderr.strip() or f"fit ended with status {done.returncode}")
    results: dict[str, float] = json.loads((folder / "run" / RESULT).read_text())
    return results


def cases(options: argparse.Namespace) -> dict[str, Callable[..., dict[str, float]]]:
    """What is to be run, by name; each takes the options and a folder."""
    if options.model == "embedded":
        return {
            Path(stage).stem + ("" if mass is None else f"_mass_{mass:g}"): partial(run_stage, stage=stage, mass=mass)
            for stage, mass in product(options.stages, options.masses)
        }
    pairs = product(options.tiles, options.strategies)
    return {f"{n}_tiles_{Path(name).stem}": partial(run_case, tiles=n, strategy=name) for n, name in pairs}


def samples_of_a_step(model: str, memory: int) -> int:
    """Default batch size of a model on a GPU of so many bytes."""
    if model != "paper":
        return 4
    return 2 if memory >= TWO_PAGES else 1


def matmul_tflops(size: int = 1024, times: int = 8, *, half: bool = False) -> float:
    """Rate of a float32 (half: bfloat16) matrix product on the CPU, in 10¹² operations a second: the best of some."""
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if half else torch.float32)
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def parse_options(cuda: bool) -> argparse.Namespace:
    """Read the command line; defaults are those of a machine with or without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=("small", "paper", "embedded"), default="paper" if cuda else "small")
    parser.add_argument("--stages", nargs="+", default=[str(ROOT / "configs/stage/documents.yaml")], help="embedded")
    parser.add_argument("--masses", type=float, nargs="+", default=[None], help="embedded: connector.collapse.mass")
    parser.add_argument("--weights", help="embedded: folder that the stages start from")
    parser.add_argument("--connector", help="embedded: a file of configs/model/connector, or one's own")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 9] if cuda else [1])
    parser.add_argument("--strategies", nargs="+", default=list(CUDA_STRATEGIES) if cuda else ["auto"])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--batch_size", type=int, help="samples of a step; default: 4, of the paper's model 1, from 100 GiB 2"
    )
    parser.add_argument("--text", type=int, default=64, help="letters of question and answer, a token each")
    parser.add_argument("--precision", help="default: bf16-mixed on a GPU and for the embedded default, else 32-true")
    options = parser.parse_args()
    half = options.device == "cuda" or options.model == "embedded"
    options.precision = options.precision or ("bf16-mixed" if half else "32-true")
    if options.device == "cuda" and not cuda:
        raise SystemExit("--device cuda: there is no CUDA device here")
    memory = torch.cuda.get_device_properties(0).total_memory if options.device == "cuda" else 0
    options.batch_size = options.batch_size or samples_of_a_step(options.model, memory)
    return options


def main() -> int:
    """Print the results of each case."""
    options = parse_options(torch.cuda.is_available())
    failed: dict[str, str] = {}
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu"}
    with tempfile.TemporaryDirectory() as root:
        for case, run in cases(options).items():
            try:
                found = run(options, Path(root) / case)
            except CaseError as error:
                print(f"{case}  fit failed\n{str(error)[-4000:]}", flush=True)
                failed[case] = str(error).splitlines()[-1][-300:]
                continue
            print(case, *(f"{name} {value:.4g}" for name, value in found.items()), sep="  ", flush=True)
            results |= {f"{case}_{name}": round(value, 5) for name, value in found.items()}
    ratios = [value for name, value in results.items() if name.endswith("fit_over_bare")]
    if ratios:
        results["fit_over_bare"] = min(ratios)
        print(f"fit over bare loop: {min(ratios):.3f} (target {TARGET})")
    if failed:
        results["failed"] = failed
        print(f"failed: {', '.join(failed)}")
    if options.json:
        print(json.dumps(results))
    return int(bool(failed) or (bool(ratios) and min(ratios) < TARGET))


if __name__ == "__main__":
    sys.exit(main())
