"""`demo`: documents, weights, three stages and both scores, from nothing to `runs/demo/results.json`.

It runs the very commands a user would type, prints each of them, and ends with one line `demo: {json}`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import AlignVLMError, ConfigError
from ..utils.atomic_files import write_results
from ..utils.installation import configs_dir
from ..utils.text_table import text_table
from .recipe import plan_runs

DATA = Path("data/demo")
PAGE_HEIGHT_PX = 96
"""CONTRACT: the tile height of configs/model/embedded.yaml, so that a page is one tile."""
READOUT = "readout-lines"
"""CONTRACT: configs/data/demo-*.yaml and configs/benchmark/demo.yaml name this set and `DATA`."""

REAL = "ALIGNVLM_REAL"
"""Environment variable: folder of real data with `sroie/` in it; default `../shared/real`."""


def run(argv: list[str]) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="alignvlm demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--train", type=int, default=3000, help="training documents (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=8000, help="pages of plain lines (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=48, help="held-out questions of a kind (default: %(default)s)")
    parser.add_argument("--started", type=float, default=time.time(), help="start in seconds since 1970, for `minutes`")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[], help="further options of `fit`, last")
    options = parser.parse_args(argv[1:])
    _prepare(options)
    demo, untrained, trained = (options.run_dir / name for name in ("", "untrained", "trained"))
    model = ("--model", config_path("model/embedded"), "--trainer", config_path("cluster/cpu"))
    _test(untrained, *model, "--data", config_path("data/demo-documents"))
    fit = ("--config", config_path("recipe/demo"), "--run_dir", str(demo), *options.fit)
    run_command("fit", *fit)
    last = plan_runs(list(fit))[-1].folder
    assert last is not None, "the recipe has stages"
    checkpoint = str(last / "checkpoints" / "last.ckpt")
    # fp32, so that the Hugging Face folder gives the same answers wherever it is loaded.
    precision = ("--trainer.precision", "32-true")
    _test(trained, "--config", str(last / "config.yaml"), "--ckpt_path", checkpoint, *precision)
    minutes = (time.time() - options.started) / 60
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (untrained, trained))
    _report(demo, before, after, minutes)
    return 0


def _prepare(options: argparse.Namespace) -> None:
    sizes = [("--train", options.train), ("--lines", options.lines), ("--heldout", options.heldout)]
    words = [str(word) for size in sizes for word in size]
    run_command("prepare", "embedded")
    pages = ("--height", str(PAGE_HEIGHT_PX), "--faults", "0.4")
    run_command("prepare", "synthetic", "--out", str(DATA), *pages, *words)
    real = Path(os.environ.get(REAL, "../shared/real")) / "sroie"
    source = DATA / "heldout-lines"
    if real.is_dir():
        run_command("prepare", "sroie", str(real), str(DATA / "sroie"))
        source = DATA / "sroie" / "lines"
    link = DATA / READOUT
    link.unlink(missing_ok=True)
    link.symlink_to(source.relative_to(DATA))


def _test(folder: Path, *words: str) -> None:
    run_command("test", *words, "--benchmark", config_path("benchmark/demo"), "--run_dir", str(folder))


def run_command(*words: str) -> None:
    """Run one command of this program in this process; raise an AlignVLMError where it did not succeed."""
    from . import main

    sys.stdout.write(f"\n$ python cli.py {' '.join(words)}\n")
    sys.stdout.flush()
    if status := main(list(words)):
        raise AlignVLMError(f"`{words[0]}` ended with status {status}; the same command continues from here")


def config_path(name: str) -> str:
    """Return the path of `configs/NAME.yaml` from the working directory."""
    path = configs_dir() / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: install alignvlm_pl again")
    return os.path.relpath(path)


def _report(folder: Path, untrained: dict[str, Any], trained: dict[str, Any], minutes: float) -> None:
    from ..scoring.contact_sheet import contact_sheet

    summary = {
        "exact_match": trained["overall"]["exact_match"],
        "anls": trained["overall"]["anls"],
        "untrained_exact_match": untrained["overall"]["exact_match"],
        "cer": trained["benchmarks"][READOUT]["cer"],
        "minutes": minutes,
    }
    summary = {name: round(value, 4) for name, value in summary.items()}
    real = (DATA / READOUT).resolve().name == "lines"
    lines = "real SROIE line crops" if real else "synthetic lines in held-out fonts"
    readout = {"set": lines, "case": "ignored"}
    write_results(folder / "results.json", {**trained, "untrained": untrained, "readout": readout, "demo": summary})
    contact_sheet(folder / "trained" / "predictions", folder / "examples.png")
    sys.stdout.write("\n" + _table(untrained, trained) + "\n")
    sys.stdout.write(f"\nreadout: {lines}, case ignored; examples in {folder / 'examples.png'}\n")
    sys.stdout.write(f"look: tensorboard --logdir {folder}\n\ndemo: {json.dumps(summary)}\n")


def _table(untrained: dict[str, Any], trained: dict[str, Any]) -> str:
    rows = [("held-out dataset", "questions", "metric", "untrained", "trained")]
    before = {**untrained["benchmarks"], "all questions": untrained["overall"]}
    for name, scores in {**trained["benchmarks"], "all questions": trained["overall"]}.items():
        for metric in ("cer",) if "cer" in scores else ("anls", "exact_match"):
            rows.append((name, str(scores["num"]), metric, f"{before[name][metric]:.3f}", f"{scores[metric]:.3f}"))
    return "\n".join(text_table(rows))
