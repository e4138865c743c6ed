"""`replay`: rebuild the batch of one training step from a run's config and ledger, on one CPU process."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from callbacks.ledger_file import Entry

    from ..training.module import AlignVLMModule
    from .replay_weights import Weights

_PROMPT_CHARACTERS = 48
_COLUMNS = (
    "rank",
    "micro",
    "key",
    "source",
    "tiles",
    "tokens",
    "supervised",
    "recorded",
    "recomputed",
    "prompt",
)


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro batch, rebuilt.

    Attributes:
        entry: What the ledger says.
        batch: As training was given it.
        prompts: Last question of each document.
        own: `losses`, `loss` and `sources` as in the ledger, under the weights that were loaded; None: not asked for.
    """

    entry: "Entry"
    batch: dict[str, Any]
    prompts: list[str]
    own: dict[str, Any] | None = None


def run(argv: list[str]) -> int:
    """Print the samples of a step, and their losses then and now."""
    options = _parser().parse_args(argv[1:])
    if options.step < 1:
        raise ConfigError(f"--step {options.step}: steps count from 1")
    config = _config(options.run)
    from callbacks.ledger_file import FOLDER, read_step

    entries = read_step(options.run / FOLDER, options.step)
    from .replay_run import compute, open_run, rebuild

    module, data = open_run(config, entries[0].head)
    micros, weights = list(rebuild(data, entries)), None
    if not options.samples_only:
        micros, weights = compute(module, micros, run=options.run, config=config, given=options.weights)
    if options.json:
        sys.stdout.write(json.dumps(_record(options.step, micros, weights)) + "\n")
    else:
        sys.stdout.write("\n".join(_told(options.step, micros, weights, module)) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignvlm replay", description=__doc__)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the run, which has its config.yaml"
    )
    parser.add_argument(
        "--step", type=int, required=True, help="optimizer step, counted from 1 as in TensorBoard"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="checkpoint or folder of weights to compute the losses with; default: those the step began with, if they "
        "are still there, else the nearest",
    )
    parser.add_argument("--samples_only", action="store_true", help="build no model and compute no losses")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _config(folder: Path) -> dict[str, Any]:
    """The saved configuration of a run.

    Raises:
        ConfigError: There is no such run, or it is no run of `fit`.
    """
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob("*/config.yaml"))
        hint = f"; it has the stages {', '.join(inside)}: give one of these folders" if inside else ""
        raise ConfigError(
            f"--run {folder}: there is no config.yaml, which `fit` writes into its run_dir{hint}"
        )
    content = yaml.safe_load(path.read_text("utf-8"))
    missing = [key for key in ("model", "data", "stage", "trainer") if key not in (content or {})]
    if missing:
        raise ConfigError(f"{path} has no {', '.join(missing)}: it is not the config of a `fit`")
    config: dict[str, Any] = content
    return config


def _rows(micros: Sequence[Micro]) -> Iterator[tuple[str, ...]]:
    for micro in micros:
        line = micro.entry.line
        for number, key in enumerate(line["keys"]):
            prompt = " ".join(micro.prompts[number].split())
            if len(prompt) > _PROMPT_CHARACTERS:
                prompt = prompt[: _PROMPT_CHARACTERS - 1] + "…"
            yield (
                str(line["rank"]),
                str(line["micro"]),
                key,
                micro.batch["sources"][number],
                str(line["tiles"][number]),
                str(line["tokens"][number]),
                str(line["supervised"][number]),
                f"{line['losses'][number]:.6f}",
                "-" if micro.own is None else f"{micro.own['losses'][number]:.6f}",
                prompt,
            )


def _told(
    step: int, micros: Sequence[Micro], weights: "Weights | None", module: "AlignVLMModule"
) -> Iterator[str]:
    """Lines of the report."""
    head = micros[0].entry.head
    documents = sum(len(micro.entry.line["keys"]) for micro in micros)
    yield (
        f"step {step} of stage {head['stage']}: {documents} samples in {len(micros)} micro batches of "
        f"{head['world']} ranks"
    )
    if weights is not None:
        yield f"losses recomputed with {weights.told(step)}"
        if head["device"] != "cpu":
            yield f"the run was on {head['device']}, this is a CPU: the same weights agree to rounding only"
        if any(part.p for part in module.modules() if type(part).__name__ == "Dropout" and part.training):
            yield "the model drops out at random while it trains, so no two losses of a batch are equal"
    table = [_COLUMNS, *_rows(micros)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS) - 1)]
    for row in table:
        cells = [
            cell.ljust(width) if 1 < n < 4 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()
    for micro in micros:
        line = micro.entry.line
        yield f"rank {line['rank']} micro {line['micro']} recorded: {_losses(line)}"
        if micro.own is not None:
            yield f"rank {line['rank']} micro {line['micro']} recomputed: {_losses(micro.own)}"
    yield "step: " + ", ".join(f"{name} {value:.6f}" for name, value in step_losses(micros).items())


def _losses(line: Mapping[str, Any]) -> str:
    sources = (f"{name} {mean:.6f} ({count} tokens)" for name, (mean, count) in line["sources"].items())
    return f"loss {line['loss']:.6f}; by source {', '.join(sources)}"


def step_losses(micros: Sequence[Micro]) -> dict[str, float]:
    """Mean loss of a supervised token over all micro batches: `recorded`, and `recomputed` if it was."""
    counts = [sum(micro.entry.line["supervised"]) for micro in micros]
    total = max(sum(counts), 1)
    recorded = sum(m.entry.line["loss"] * n for m, n in zip(micros, counts, strict=True)) / total
    found = [micro.own["loss"] for micro in micros if micro.own is not None]
    if len(found) < len(micros):
        return {"recorded": recorded}
    own = sum(loss * n for loss, n in zip(found, counts, strict=True)) / total
    return {"recorded": recorded, "recomputed": own}


def _record(step: int, micros: Sequence[Micro], weights: "Weights | None") -> dict[str, Any]:
    return {
        "step": step,
        **step_losses(micros),
        "weights": None if weights is None else weights.told(step),
        "weights_of_the_step": None if weights is None else weights.began(step),
        "micro_batches": [
            {
                **m.entry.line,
                "sources_of": m.batch["sources"],
                "prompts": m.prompts,
                "recomputed": m.own,
            }
            for m in micros
        ],
    }


def changed(where: str, what: str, found: Any, expected: Any) -> DataError:
    """The error for data that are not what the run was trained on."""
    return DataError(
        f"{where}: {what} is now {found}, in the run it was {expected}; the data, the processor or the code have "
        "changed since: restore them"
    )
