"""Cells of a study, one after the other or one alone, and the report.

A cell is killed and started again like any run; one that is finished has a result file, and is never run again.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml

from ..errors import ConfigError, require_known
from ..models.connectors import connector_class
from ..study import cost, examples, forgetting, noise, reduced, tokens
from ..study.measure import Measure, Trained, has_measure
from ..study.measured import benchmark_manifests, measure_run
from ..study.plan import TUNING, Cell, Study, connector_of, read_study, recipe_of_lengths
from ..study.report import REPORTS, design, write_report
from ..study.results import Results
from ..study.schedule import Place, cell_at, places
from ..utils.atomic_files import write_atomically
from ..utils.yaml_files import load_yaml
from .demo import run_command
from .recipe import plan_runs, read_stages

OWNER = "cell.json"
MEASURES: dict[str, Measure] = {
    "noise": noise.measure,
    "tokens": tokens.measure,
    "prune": reduced.measure_prune,
    "collapse": reduced.measure_collapse,
    "forgetting": forgetting.measure,
    "examples": examples.measure,
}
"""Name in a study's `measures` -> what takes it."""


def run_study(options: argparse.Namespace) -> int:
    """Run what is missing and report, or run the cell of `--cell` alone; the options are those of `study`."""
    for name in options.names:
        require_known(name, REPORTS, f"study {name!r} is unknown")
    study = read_study(options.config)
    for name in options.names:
        if name in MEASURES and name not in study.measures:
            raise ConfigError(f"study {study.name} measures no {name}: add `measures: {{{name}: …}}` to {study.path}")
    root = options.run_dir or Path("runs/study") / study.name
    results = Results(options.results or root / "results")
    grid = places(study)
    if options.list:
        sys.stdout.writelines(
            f"{number}\t{place}\t{_state(study, place, results)}\n" for number, place in enumerate(grid)
        )
        return 0
    if options.cell is not None and not 0 <= options.cell < len(grid):
        raise ConfigError(
            f"--cell {options.cell}: study {study.name} has cells 0 to {len(grid) - 1}; --list shows them"
        )
    if "cost" in options.names and not options.report_only and options.cell is None:
        cost.update_cost(study, results)
    if not options.report_only and options.names != ["cost"]:  # which needs no cell
        _check_arms(study)
        _print_design(study)
        for place in grid if options.cell is None else [grid[options.cell]]:
            cell = cell_at(study, place, results)
            if not _is_finished(cell, results):
                sys.stdout.write(f"\nstudy {study.name}, cell {grid.index(place)} of {len(grid)}: {place}\n")
                run_cell(cell, root / cell.id, results)
    if options.cell is None or options.report_only:  # other tasks of an array may be writing
        folder = options.report or root / "report"
        for path in write_report(study, options.names, results, folder, command=_command(options)):
            sys.stdout.write(f"{path}\n")
    return 0


def _check_arms(study: Study) -> None:
    """Raise a ConfigError where a measure needs P_vocab, and no arm has it."""
    types = {arm: connector_of(study, arm).get("type", "align") for arm in study.arms}
    reading = [arm for arm, kind in types.items() if getattr(connector_class(kind), "reads_text", False)]
    for name in ("prune", "collapse"):
        if name in study.measures and not reading:
            listing = ", ".join(f"{arm} ({kind})" for arm, kind in types.items())
            raise ConfigError(
                f"study {study.name}: measures.{name} needs P_vocab, which no arm has: {listing}; add an arm with "
                "connector type 'align', or leave the measure out"
            )


def _print_design(study: Study) -> None:
    """Print what each benchmark of the study can detect."""
    shared = load_yaml(study.recipe).get("data")
    default = None if shared is None else study.recipe.parent / shared
    data = read_stages(study.recipe)[-1].settings("data", default)
    for name, manifest in benchmark_manifests(data).items():
        least = design(study, documents=manifest.num_samples)
        sys.stdout.write(f"{name}, if each question has a document of its own: {least}\n")


def run_cell(cell: Cell, folder: Path, results: Results) -> None:
    """Train a cell in its folder, test it, and write its result.

    Raises:
        ConfigError: If the folder is that of another cell.
    """
    _own(cell, folder)
    recipe = cell.recipe
    if cell.steps is not None:
        recipe = folder / recipe.name  # its name is that of the run in logs
        write_atomically(recipe, yaml.safe_dump(recipe_of_lengths(cell.recipe, cell.steps), sort_keys=False))
    fit = [*cell.words(recipe), "--run_dir", str(folder)]
    trained = Trained(stages=[run.folder for run in plan_runs(fit) if run.folder], folder=folder)
    tested, before = trained.tested, results.read(cell)
    if not (trained.stages[-1] / "hf").is_dir():
        for old in (tested, trained.measures):  # of weights that are gone
            shutil.rmtree(old, ignore_errors=True)
        if before is not None:
            before["measures"] = {}
        run_command("fit", *fit)
    if not (tested / "results.json").is_file():
        benchmarks = ["--data.init_args.benchmarks={}"] if cell.budget == TUNING else []
        run_command("test", *trained.test_options, *benchmarks, "--run_dir", str(tested))
    result = measure_run(trained.stages, tested)
    if before is not None:  # lengths of other cells follow from its time
        result |= {"measures": before["measures"], "seconds": before["seconds"]}
    results.write(cell, result)
    for name, settings in cell.study.measures.items() if cell.budget == "samples" else ():
        if not has_measure(cell.study, name, result):
            found = MEASURES[name](trained, settings, run_command)
            result["measures"][name] = {"settings": settings, "found": found}
            results.write(cell, result)


def _is_finished(cell: Cell, results: Results) -> bool:
    """Return whether a cell has its result, with all measures of the study."""
    result = results.read(cell)
    wanted = cell.study.measures if cell.budget == "samples" else ()
    return result is not None and all(has_measure(cell.study, name, result) for name in wanted)


def _own(cell: Cell, folder: Path) -> None:
    owner, own = folder / OWNER, {"cell": cell.id, "study": cell.study.name, "arm": cell.arm, "seed": cell.seed}
    if owner.is_file():
        found = json.loads(owner.read_text("utf-8"))
        if found.get("cell") != cell.id:
            raise ConfigError(
                f"{folder} holds cell {found.get('cell')} of study {found.get('study')}; remove it, or set --run-dir"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no cell of a study; remove it, or set --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(owner, json.dumps(own) + "\n")


def _state(study: Study, place: Place, results: Results) -> str:
    try:
        cell = cell_at(study, place, results)
    except ConfigError as error:
        return f"waits: {error}"
    return f"{cell.id}\t{'finished' if _is_finished(cell, results) else 'missing'}"


def _command(options: argparse.Namespace) -> str:
    return " ".join(["python cli.py study", *options.names, "--config", str(options.config)])
