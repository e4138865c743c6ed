"""`box`: make the model `box:receipts` again, from nothing: data, stages, scores, and the file of the box.

It runs the very commands a user would type, as `demo` does, and continues where it stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..pretrained.box import pack_box, unpack_box
from .demo import config_path, run_command
from .recipe import plan_runs

DATA = "data/receipts"
"""CONTRACT: configs/data/receipts*.yaml name the datasets in it."""
PAGE_WIDTH_PX = 768
"""CONTRACT: the width of a tile of configs/model/receipts.yaml, and of the pages that `prepare` writes by default."""
_WIDTH = ("--width", str(PAGE_WIDTH_PX), "--faults", "0.5")
_SYNTHETIC = {
    "dense": (*_WIDTH, "--height", str(PAGE_WIDTH_PX), "--lines", "2400", "--train", "0", "--heldout", "0"),
    "short": (*_WIDTH, "--height", "192", "--train", "1200", "--kinds", "form=1,receipt=1,table=1", "--lines", "0",
              "--heldout", "0"),
    "synthetic": ("--pages", "1500", "--faults", "0.5", "--heldout", "40", "--train", "0", "--lines", "0"),
}  # fmt: skip
"""Folder -> options of `prepare synthetic`."""
LINES = "readout-lines"


def run(argv: list[str]) -> int:
    """Make the model, and print its scores as one line of JSON."""
    parser = argparse.ArgumentParser(prog="alignvlm box", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=["receipts"], help="the model")
    parser.add_argument("roots", nargs="+", metavar="ROOT", help="folders of receipts, as `prepare sroie` takes them")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/receipts"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file of the box; default: RUN_DIR/receipts.safetensors")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[], help="further options of `fit`, last")
    options = parser.parse_args(argv[1:])
    started, run_dir = time.time(), options.run_dir
    prepare(options.roots)
    fit = ("--config", config_path("recipe/receipts"), "--run_dir", str(run_dir), *options.fit)
    run_command("fit", *fit)
    last = plan_runs(list(fit))[-1].folder
    assert last is not None, "the recipe has stages"
    minutes = (time.time() - started) / 60
    out, unpacked = options.out or run_dir / "receipts.safetensors", run_dir / "unpacked"
    packed = pack(last / "hf", out)
    unpacked.mkdir(exist_ok=True)
    unpack_box(out, unpacked)  # what is scored is what a user gets
    scores = score(last / "config.yaml", unpacked, run_dir)
    sys.stdout.write(f"\nbox: {json.dumps({**scores, **packed, 'minutes': round(minutes, 1)})}\n")
    return 0


def prepare(roots: list[str]) -> None:
    """Write the datasets of the recipe, the same bytes each time."""
    run_command("prepare", "embedded")
    run_command("prepare", "sroie", *roots, f"{DATA}/sroie")
    for folder, words in _SYNTHETIC.items():
        run_command("prepare", "synthetic", "--out", f"{DATA}/{folder}", *words)


def pack(folder: Path, out: Path) -> dict[str, float]:
    """Write the box of an exported folder of the recipe; see `pretrained.box.pack_box`."""
    return pack_box(folder, out, reading={"page_width": PAGE_WIDTH_PX, "question": "What is the {}?"})


def score(config: Path, weights: Path, run_dir: Path) -> dict[str, Any]:
    """Score weights on the receipts held out and on their lines, these in the tiles of the embedded default."""
    model = ("--model.weights", str(weights), "--trainer.precision", "32-true")
    run_command("test", "--config", str(config), *model, "--run_dir", str(run_dir / "heldout"))
    data = ("--data", config_path("data/receipts"), f"--data.init_args.benchmarks={{{LINES}: {DATA}/sroie/lines}}")
    parts = ("--model", config_path("model/embedded"), "--trainer", config_path("cluster/cpu"))
    benchmark = ("--benchmark", config_path("benchmark/demo"))
    run_command("test", *parts, *data, *benchmark, *model, "--run_dir", str(run_dir / "lines"))
    fields, lines = (
        json.loads((run_dir / name / "results.json").read_text())["benchmarks"][benchmark]
        for name, benchmark in (("heldout", "receipts"), ("lines", LINES))
    )
    return {**{name: round(value, 4) for name, value in fields.items() if "/" in name}, "cer": round(lines["cer"], 4)}
