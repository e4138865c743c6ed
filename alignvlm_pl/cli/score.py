"""`score`: the scores of a prediction file made anywhere; loads no model."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..scoring.files import PredictionFile
    from ..scoring.run import Scored


def run(argv: list[str]) -> int:
    """Score a prediction file and print its scores; those of part of a benchmark are marked as incomplete."""
    parser = argparse.ArgumentParser(prog="alignvlm score", description=__doc__)
    parser.add_argument("--benchmark", required=True, help="name or import path of a benchmark, for example docvqa")
    table = "our jsonl, or an xlsx, json or tsv table of VLMEvalKit's results"
    parser.add_argument("--predictions", type=Path, required=True, help=table)
    parser.add_argument("--rule", help="score under this rule alone; default: under all that the benchmark reports")
    shards = "folder of the dataset's shards, for files without references, and to find missing keys"
    parser.add_argument("--answers", type=Path, help=shards)
    parser.add_argument("--judge", help="module:function that grades predictions, for benchmarks that need a judge")
    parser.add_argument("--out", type=Path, help="folder for results, problems, reports and scored predictions")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(argv[1:])
    if options.out and options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out}: expected a folder, found a file")

    from ..benchmarks import Prompt, load_benchmark
    from ..scoring.files import join_gold, read_predictions
    from ..scoring.judge import grade, load_judge
    from ..scoring.run import score_samples

    # What was asked of a model that answered elsewhere is not known.
    benchmark = replace(load_benchmark(options.benchmark), prompt=Prompt(), prompts={})
    found, expected = read_predictions(options.predictions, benchmark), None
    if options.answers:
        from datamodules.shards.manifest import load_manifest
        from datamodules.shards.reader import read_answers

        found = join_gold(found, read_answers(options.answers))
        expected = benchmark.size_from(load_manifest(options.answers).extra.get("origin", ""))
    samples = found.scorable(benchmark, options.predictions)
    samples = grade(samples, load_judge(options.judge)) if options.judge else samples
    scored = score_samples(benchmark, samples, rule=options.rule, expected=expected, problems=found.problems)
    _print(scored, found.notes)
    if options.out:
        _write(options.out, scored, found)
    if options.json:
        from ..utils.atomic_files import to_json

        scores = {"num": scored.num, "complete": not scored.problems, **scored.metrics}
        sys.stdout.write(to_json(scores) + "\n")
    return 0


def _print(scored: "Scored", notes: list[str]) -> None:
    from ..scoring.report import percent
    from ..utils.atomic_files import printable

    def write(line: str) -> None:
        sys.stdout.write(printable(line))

    mark = ", INCOMPLETE" if scored.problems else ""
    write(f"{scored.benchmark.title} {scored.benchmark.split}: {scored.num:,} questions{mark}\n")
    for problem in scored.problems:
        write(f"  incomplete: {problem}\n")
    for note in notes:
        write(f"  note: {note}\n")
    for score, value in scored.metrics.items():
        ends = scored.intervals.get(score)
        interval = f"  [{percent(ends[0])}, {percent(ends[1])}]" if ends else ""
        write(f"  {score:<40} {percent(value):>7}{interval}{mark}\n")
    for model, printed in scored.benchmark.paper.items():
        write(f"  printed in the paper: {model:<34} {printed:.2f}\n")


def _write(folder: Path, scored: "Scored", found: "PredictionFile") -> None:
    from ..scoring.problems import problem_lists
    from ..scoring.records import scored_records, to_records
    from ..scoring.report import write_reports
    from ..scoring.results import results
    from ..utils.atomic_files import write_predictions, write_results

    name = scored.benchmark.name
    records = [*to_records(scored.samples), *found.unread]
    write_predictions(folder / "predictions" / f"{name}.jsonl", scored_records(records, scored))
    write_results(folder / "results.json", results({name: scored}))
    write_results(folder / "problems.json", problem_lists({name: scored.problems}))
    write_reports(folder, {name: scored}, images=folder / "predictions" / "images")
    sys.stdout.write(f"report: {folder / 'report.html'}\n")
