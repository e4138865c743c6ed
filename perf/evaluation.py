"""Samples per second of `validate` on a benchmark, over those of bare `generate` on the same batches.

    python perf/evaluation.py [--json] [--samples 96] [--rounds 3]

The embedded default, untrained, predicts on rendered pages. An evaluation reads shards, cuts tiles, generates, keeps a
journal, scores, and writes predictions, pages and reports; the bare run is given its batches ready made. Both are timed
in turns in one process; the ratio of the medians is the result. With `--json` the last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

PAGE_HEIGHT_PX = 96


def main() -> int:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--samples", type=int, default=96, help="questions; default 96")
    parser.add_argument("--batch", type=int, default=16, help="questions of a batch; default 16")
    parser.add_argument("--tokens", type=int, default=40, help="longest answer; default 40")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured; default 3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options)
    print(f"{options.samples} questions, batches of {options.batch}: {results}")
    if options.json:
        print(json.dumps(results))
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return both rates in samples per second, and the ratio of the medians."""
    import lightning.pytorch as pl
    import torch

    from alignvlm_pl.cli import main as command
    from alignvlm_pl.cli.params import read_spec
    from alignvlm_pl.training.module import AlignVLMModule
    from alignvlm_pl.utils.installation import configs_dir
    from callbacks.benchmark_evaluation import BenchmarkEvaluation
    from datamodules import BenchmarkDataModule

    class Timed(BenchmarkEvaluation):
        start = seconds = 0.0

        def on_validation_start(self, *arguments: Any) -> None:
            self.start = time.perf_counter()

        def on_validation_epoch_end(self, *arguments: Any) -> None:
            super().on_validation_epoch_end(*arguments)
            self.seconds = time.perf_counter() - self.start

    heldout = ["--train", "8", "--lines", "8", "--heldout", str(options.samples)]
    command(["prepare", "embedded"])
    command(["prepare", "synthetic", "--out", str(folder), "--height", str(PAGE_HEIGHT_PX), *heldout])
    data = BenchmarkDataModule(
        benchmarks={"forms": folder / "heldout-forms"}, eval_batch_size=options.batch, num_workers=1
    )
    callback = Timed(max_new_tokens=options.tokens)
    module = AlignVLMModule(spec=read_spec(configs_dir() / "model" / "embedded.yaml"))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder / "run",
        precision="bf16-mixed",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    evaluation, bare = [], []
    for _ in range(options.rounds):
        trainer.validate(module, datamodule=data, verbose=False)
        evaluation.append(callback.seconds)
        module.eval()
        with torch.inference_mode():
            batches = list(data.benchmark_dataloader("forms"))
            start = time.perf_counter()
            for batch in batches:
                module.generate(batch, max_new_tokens=options.tokens)
            bare.append(time.perf_counter() - start)
    rates = {
        "evaluation_samples_per_s": options.samples / statistics.median(evaluation),
        "bare_samples_per_s": options.samples / statistics.median(bare),
    }
    ratio = rates["evaluation_samples_per_s"] / rates["bare_samples_per_s"]
    return {name: round(value, 3) for name, value in {**rates, "evaluation_over_bare": ratio}.items()}


if __name__ == "__main__":
    raise SystemExit(main())
