"""`replay`: rebuild the batch of one training step from a run's config and sample log, on one CPU process."""

import argparse
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..utils.atomic_files import to_json
from ..utils.text_table import text_table
from ..utils.yaml_files import load_yaml

if TYPE_CHECKING:
    from .replay_run import Micro, Weights

_PROMPT_CHARACTERS = 48
_COLUMNS = "rank micro key source tiles tokens supervised recorded recomputed prompt".split()


def run(argv: list[str]) -> int:
    """Print the samples of a step, with their recorded losses and those that are computed again."""
    parser = argparse.ArgumentParser(prog="alignvlm replay", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, which has its config.yaml")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1")
    parser.add_argument("--weights", type=Path, help="checkpoint or export; default: nearest to the step's begin")
    parser.add_argument("--samples_only", action="store_true", help="build no model and compute no losses")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv[1:])
    if options.step < 1:
        raise ConfigError(f"--step {options.step}: steps count from 1")
    config = _config(options.run)
    from callbacks.ledger_file import FOLDER, read_step

    entries = read_step(options.run / FOLDER, options.step)
    from .replay_run import compute, open_run, rebuild

    module, data = open_run(config, entries[0].head)
    micros, weights = rebuild(data, entries), None
    if not options.samples_only:
        weights = compute(module, micros, options.run, config, options.weights)
    report = _json if options.json else _table
    sys.stdout.writelines(f"{line}\n" for line in report(options.step, micros, weights))
    return 0


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob("*/config.yaml"))
        hint = f"; it has the stages {', '.join(inside)}: give one of these folders" if inside else ""
        raise ConfigError(f"--run {folder}: there is no config.yaml, which `fit` writes there{hint}")
    content = load_yaml(path)
    if missing := [key for key in ("model", "data", "stage", "trainer") if key not in content]:
        raise ConfigError(f"{path} has no {', '.join(missing)}: it is not the config of a `fit`")
    return content


def _table(step: int, micros: Sequence["Micro"], weights: "Weights | None") -> Iterator[str]:
    head = micros[0].entry.head
    samples = f"{sum(len(micro.prompts) for micro in micros)} samples in {len(micros)} micro batches"
    yield f"step {step} of stage {head['stage']}: {samples} of {head['world']} ranks"
    if weights is not None:
        yield f"losses recomputed with {weights.explain(step)}"
        if head["device"] != "cpu":
            yield f"the run was on {head['device']}, this is a CPU: the same weights agree to rounding only"
    rows = [_COLUMNS, *(row for micro in micros for row in _rows(micro))]
    yield from text_table(rows)
    yield "step: " + ", ".join(f"{name} {value:.6f}" for name, value in _losses(micros).items())


def _rows(micro: "Micro") -> Iterator[list[str]]:
    line = micro.entry.line
    for number, key in enumerate(line["keys"]):
        prompt = " ".join(micro.prompts[number].split())[:_PROMPT_CHARACTERS]
        cells = [line["rank"], line["micro"], key, micro.batch["sources"][number]]
        cells += [line[name][number] for name in ("tiles", "tokens", "supervised")]
        for record in (line, micro.recomputed):
            cells.append(f"{_number(record['losses'][number]):.6f}" if record else "-")
        yield [*map(str, cells), prompt]


def _number(loss: float | None) -> float:  # null stands for one that is not finite
    return math.nan if loss is None else loss


def _losses(micros: Sequence["Micro"]) -> dict[str, float]:
    """Return the mean loss of a supervised token over the step, `recorded` and, if it was, `recomputed`."""
    counts = [sum(micro.entry.line["supervised"]) for micro in micros]
    found = {"recorded": [_number(micro.entry.line["loss"]) for micro in micros]}
    if all(micro.recomputed for micro in micros):
        found["recomputed"] = [micro.recomputed["loss"] for micro in micros if micro.recomputed]
    total = max(sum(counts), 1)
    return {name: sum(map(operator.mul, losses, counts)) / total for name, losses in found.items()}


def _json(step: int, micros: Sequence["Micro"], weights: "Weights | None") -> Iterator[str]:
    record: dict[str, Any] = {"step": step, **_losses(micros), "micro_batches": []}
    record["weights"] = weights and weights.explain(step)
    record["weights_of_the_step"] = weights and weights.match(step)
    for m in micros:
        own = {"sources_of": m.batch["sources"], "prompts": m.prompts, "recomputed": m.recomputed}
        record["micro_batches"].append({**m.entry.line, **own})
    yield to_json(record)
