"""Reports of scored benchmarks: scores beside the paper's, both rule sets, disagreements, examples worst first."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader

from alignvlm_pl.metrics import get_metric
from alignvlm_pl.utils.atomic_files import write_atomically

from .records import page_path, readout_path
from .run import Scored

TABLE_1 = ("docvqa", "infovqa", "deepform", "klc", "wtq", "tabfact", "chartqa", "textvqa", "tablevqa")
"""The columns of the paper's table 1, whose plain mean is its average score."""
MAX_LISTED = 50
PAPER_RULE = "vlmevalkit-2025-02"
"""The paper's toolkit as it was when the paper appeared; reports show its scores beside those of the default rules."""
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~&"} | {"\n": " ", "\r": " "})


def write_reports(
    folder: Path, found: Mapping[str, Scored], *, images: Path, run: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write `report.md` and `report.html`; everything that comes from data or models is escaped.

    `images` is the folder of ``<dataset>/<key>.png`` and ``.readout.png`` of the examples; `run` says what was scored,
    such as run folder, weights, step and date: an empty value is left out.
    """
    content = {
        "run": [(name, value) for name, value in run.items() if value],
        "incomplete": any(scored.problems for scored in found.values()),
        "overview": _overview(found),
        "benchmarks": [_section(name, scored, images, folder) for name, scored in _in_order(found)],
        "average": _average(found),
        "max_listed": MAX_LISTED,
    }
    loader = PackageLoader("alignvlm_pl.scoring", ".")
    for name, escape in (("report.html", True), ("report.md", False)):
        environment = Environment(loader=loader, autoescape=escape, trim_blocks=True, lstrip_blocks=True)
        environment.filters["plain"] = markdown_text
        environment.filters["percent"] = percent
        write_atomically(folder / name, environment.get_template(f"{name}.j2").render(content))


def markdown_text(text: object) -> str:
    """Return a text escaped, so that Markdown shows it as it is, in one line."""
    return str(text).translate(_MARKDOWN)


def percent(value: float | None) -> str:
    """Print a fraction of 1 in per cent, as the paper does; a dash where there is no score."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _overview(found: Mapping[str, Scored]) -> dict[str, Any]:
    """Return headline scores of this run, a row a rule, and the paper's in the same columns; None: no score."""
    columns = [scored for name, scored in _in_order(found) if scored.benchmark.paper or not scored.benchmark.size]
    models = dict.fromkeys(model for scored in columns for model in scored.benchmark.paper)
    return {
        "titles": [scored.benchmark.title for scored in columns],
        "metrics": [_direction(scored) for scored in columns],
        "ours": _our_rows(columns),
        "paper": [
            (model, [scored.benchmark.paper.get(model, math.nan) / 100 for scored in columns]) for model in models
        ],
    }


def _direction(scored: Scored) -> str:
    """Return the name of the headline metric with an arrow: up where higher is better."""
    higher = get_metric(scored.benchmark.scorings[0].metric).higher_is_better
    return f"{scored.headline[0].partition('@')[0] or scored.benchmark.scorings[0].metric} {'↑' if higher else '↓'}"


def _our_rows(columns: Sequence[Scored]) -> list[tuple[str, list[tuple[float | None, bool]]]]:
    """Return rows of a label and, for each column, score and incompleteness.

    The first row has the default rule of each metric, the second `PAPER_RULE`; the others are of rules set by `--rule`.
    """
    requested = [rule for scored in columns if "" not in scored.rules for rule in scored.rules]
    rows = []
    for rule in dict.fromkeys(("", PAPER_RULE, *requested)):
        found = [(scored.headline_under(rule), bool(scored.problems)) for scored in columns]
        values = [(value, marked and (value is not None or not rule)) for value, marked in found]
        if not rule or any(value is not None for value, _ in values):
            rows.append((f"this run, rule {rule}" if rule else "this run", values))
    if requested and all(value is None for value, _ in rows[0][1]):
        del rows[0]
    return rows


def _in_order(found: Mapping[str, Scored]) -> list[tuple[str, Scored]]:
    order = {name: index for index, name in enumerate(TABLE_1)}
    return sorted(found.items(), key=lambda item: order.get(item[1].benchmark.name, len(order)))


def _section(dataset: str, scored: Scored, images: Path, folder: Path) -> dict[str, Any]:
    name, value = scored.headline
    disagreements = scored.disagreements()

    def row(index: int) -> dict[str, Any]:
        sample = scored.samples[index]
        paths = (page_path(images, dataset, sample.key), readout_path(images, dataset, sample.key))
        image, readout = (path.relative_to(folder).as_posix() if path.is_file() else "" for path in paths)
        return {"sample": sample, "scores": scored.scores[index], "image": image, "readout": readout}

    rows = map(row, scored.worst_first())
    return {
        "name": dataset,
        "benchmark": scored.benchmark,
        "scored": scored,
        "headline": (name, value, scored.intervals.get(name)),
        "direction": _direction(scored)[-1],
        "scores": [(score, value, scored.intervals.get(score)) for score, value in scored.metrics.items()],
        "prompts": scored.benchmark.prompts_are_reference(),
        "num_disagreements": len(disagreements),
        "disagreements": [row(index) for index in disagreements[:MAX_LISTED]],
        "examples": [shown for shown in rows if shown["image"]],
    }


def _average(found: Mapping[str, Scored]) -> float | None:
    complete = {scored.benchmark.name: scored.headline[1] for scored in found.values() if not scored.problems}
    return sum(complete[name] for name in TABLE_1) / len(TABLE_1) if complete.keys() >= set(TABLE_1) else None
