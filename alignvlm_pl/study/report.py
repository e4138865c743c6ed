"""The report of a study: Markdown, HTML and plots, a pure function of its file and its result files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..errors import ConfigError
from ..utils.atomic_files import write_atomically
from . import cost, examples, forgetting, noise, plots, reduced, tokens
from .compare import Row, compare
from .measure import measured
from .plan import TUNING_SEED, Study
from .results import Results
from .schedule import Place, best_rate, cell_at, places
from .statistics import smallest_difference
from .tables import interval, table

Section = Callable[[Study, Results, Path], Iterator[str]]
_PAPER: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text("utf-8"))
_CLAIMS: dict[str, list[dict[str, str]]] = _PAPER["claims"]
_TITLES = {"samples": "Equal samples", "flops": "Equal FLOPs", "seconds": "Equal wall time"}
_ASSUMED_SD = {"document_sd": 0.5, "seed_sd": 0.02}
"""Standard deviations of a paired difference before anything is measured: half of the questions of one arm differ."""
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}"
)


def write_report(study: Study, names: Sequence[str], results: Results, folder: Path, *, command: str) -> list[Path]:
    """Write `report.md`, `report.html` and the plots; return the paths of the first two.

    Raises:
        ConfigError: If a package of the extra `study` is missing.
        DataError: If results cannot be compared, or have too few documents.
    """
    try:
        import markdown
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"study needs the package {error.name}: pip install 'alignvlm_pl[study]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [f"# Study {study.name}", *_head(study, results, command)]
    for name in names:
        blocks += REPORTS[name](study, results, folder)
        if name in study.measures:
            blocks += _unmeasured(study, name, results)
    text = "\n\n".join(blocks) + "\n"
    write_atomically(folder / "report.md", text)
    page = markdown.markdown(text, extensions=["tables"])
    write_atomically(folder / "report.html", f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style>{page}\n')
    return [folder / "report.md", folder / "report.html"]


def design(study: Study, *, documents: int) -> str:
    """Return what the study can detect, before it runs."""
    least = smallest_difference(documents=documents, seeds=len(study.seeds), **_ASSUMED_SD)
    seeds = "one seed: intervals hold for it alone" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    return (
        f"{documents} documents, {seeds}: a true difference of {least:.3f} is found with a power of 80 %, if paired "
        f"differences vary by {_ASSUMED_SD['document_sd']} between documents and {_ASSUMED_SD['seed_sd']} between seeds"
    )


def _unmeasured(study: Study, name: str, results: Results) -> Iterator[str]:
    found = measured(study, name, results)
    if missing := [f"{arm} {seed}" for arm in study.arms for seed in study.seeds if seed not in found[arm]]:
        yield f"**Missing** (arm and seed): {', '.join(missing)}."


def _head(study: Study, results: Results, command: str) -> Iterator[str]:
    yield f"`{command}`"
    grid = places(study)
    waiting, unfinished, made = 0, [], {}
    for number, place in enumerate(grid):
        try:
            result = results.read(cell_at(study, place, results))
        except ConfigError:
            waiting += 1
            continue
        if result is None:
            unfinished.append(f"{number} ({place})")
        else:
            made[" · ".join(f"{key} {value}" for key, value in result["made"].items())] = result
    yield f"{len(grid) - waiting - len(unfinished)} of {len(grid)} cells are finished." + (
        f" **Missing**: {'; '.join(unfinished)}; {waiting} wait for them." if waiting or unfinished else ""
    )
    if made:
        yield "Made with: " + "; ".join(sorted(made)) + "."
        tested: dict[str, Any] = next((one["questions"] for one in made.values() if one["questions"]), {})
        documents = {name: len({*one["documents"]}) for name, one in tested.items()}
        yield from (f"{name}: {design(study, documents=count)}." for name, count in documents.items())
    yield "Intervals are 95 %: bootstrap over documents, seeds as the second level (docs/study.md)."
    if study.rates:
        yield _rates(study, results)


def _rates(study: Study, results: Results) -> str:
    assert study.rates is not None
    rows = []
    for arm in study.arms:
        losses = []
        for rate in study.rates.values:
            found = results.read(cell_at(study, Place(budget="tuning", arm=arm, seed=TUNING_SEED, rate=rate), results))
            losses.append("missing" if found is None else f"{sum(found['loss'].values()):.3f}")
        try:
            best = f"{best_rate(study, arm, results):g}"
        except ConfigError:
            best = "missing"
        rows.append([arm, *losses, best])
    head = ["arm", *(f"{rate:g}" for rate in study.rates.values), "used"]
    return (
        f"Learning rates, `{study.rates.option}`: every arm tries the same ones for {study.rates.steps} steps, "
        f"divided evenly among the stages; the one "
        f"with the least loss on the validation data is used.\n\n{table(head, rows)}"
    )


def _scores(name: str) -> Section:
    def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
        for budget in sorted(study.budgets, key=lambda one: one != "samples"):
            rows = compare(study, budget, results)
            yield f"## {_TITLES[budget]}"
            pairs = list(dict.fromkeys(pair for row in rows for pair in row.scores))
            yield _budget_table(rows)
            for metric in dict.fromkeys(metric for _, metric in pairs):
                yield _score_table(study, rows, [pair for pair in pairs if pair[1] == metric])
                yield from _score_plots(rows, metric, folder, f"{name}-{budget}-{metric}")
            yield from _claims(name, study, rows, pairs)
        if scores := _PAPER["scores"].get(name):
            rows_of_paper = [[arm, *map(str, values)] for arm, values in scores["rows"].items()]
            yield f"## The paper's averages\n\n{table(scores['head'], rows_of_paper)}"

    return section


def _budget_table(rows: Sequence[Row]) -> str:
    def mean(row: Row, key: str) -> float:
        return fmean(sum(one[key]) if key == "steps" else one[key] for one in row.results.values())

    lines = []
    for row in rows:
        if row.results:
            cells = [f"{mean(row, 'steps'):.0f}", f"{mean(row, 'samples'):.0f}", f"{mean(row, 'flops') / 1e12:.3g}"]
            lines.append([row.arm, *cells, f"{mean(row, 'seconds') / 60:.3g}", _missing(row)])
        else:
            lines.append([row.arm, "–", "–", "–", "–", _missing(row)])
    return table(["arm", "steps", "samples", "TFLOPs", "minutes", "missing seeds"], lines)


def _missing(row: Row) -> str:
    return ", ".join(map(str, row.missing)) or "none"


def _score_table(study: Study, rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> str:
    head = ["arm"]
    for dataset, metric in pairs:
        head += [f"{dataset}: {metric}", f"less {study.base}", "p (Holm)"]
    lines = []
    for row in rows:
        line = [row.arm]
        for pair in pairs:
            adjusted = row.adjusted.get(pair)
            line += [interval(row.scores.get(pair)), interval(row.differences.get(pair), sign=True)]
            line.append("–" if adjusted is None else f"{adjusted:.3f}")
        lines.append(line)
    return table(head, lines)


def _score_plots(rows: Sequence[Row], metric: str, folder: Path, stem: str) -> Iterator[str]:
    datasets = list(dict.fromkeys(dataset for row in rows for dataset, name in row.scores if name == metric))
    groups: dict[str, dict[str, plots.Interval]] = {}
    for dataset in datasets:
        found = {row.arm: row.scores[dataset, metric] for row in rows if (dataset, metric) in row.scores}
        groups[dataset] = {arm: (one.mean, one.low, one.high) for arm, one in found.items()}
    if not groups:
        return
    plots.bars(folder / f"{stem}.svg", metric, groups)
    yield f"![{metric}]({stem}.svg)"
    if len(datasets) >= 3:
        means = {row.arm: [row.scores[one, metric].mean for one in datasets] for row in rows if row.scores}
        plots.radar(folder / f"{stem}-radar.svg", metric, datasets, means)
        yield f"![{metric}, radar]({stem}-radar.svg)"


def _claims(name: str, study: Study, rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield claims beside this study's differences; those that the base arm is part of can be told."""
    by_arm = {row.arm: row for row in rows}
    lines = []
    for claim in _CLAIMS[name]:
        names = claim["above"], claim["below"]
        other = next((arm for arm in names if arm != study.base), study.base)
        if study.base not in names or not by_arm.keys() >= {*names}:
            continue
        sign = 1 if other == claim["above"] else -1
        for pair in pairs:
            found = by_arm[other].differences.get(pair)
            if found is None:
                continue
            verdict = "cannot be told at this size"
            if by_arm[other].adjusted[pair] < 0.05:
                verdict = "holds" if sign * found.mean > 0 else "does not hold"
            low, high = sorted((sign * found.low, sign * found.high))
            ours = f"{pair[0]}, {pair[1]}: {sign * found.mean:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append([claim["claim"], claim["paper"], ours, verdict])
    if lines:
        yield "### Claims\n\n" + table(["claim", "the paper's averages", "here, difference", ""], lines)


REPORTS: dict[str, Section] = {
    **{name: _scores(name) for name in _CLAIMS},
    "noise": noise.section,
    "tokens": tokens.section,
    "cost": cost.section,
    "prune": reduced.section("prune"),
    "collapse": reduced.section("collapse"),
    "forgetting": forgetting.section,
    "examples": examples.section,
}
"""Section of the report -> what writes it."""
