"""The report of a study: Markdown, HTML and plots, a pure function of its file and its result files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from ..errors import ConfigError
from ..utils.atomic_files import write_atomically
from . import forgetting, noise, plots, reduced, tokens
from .compare import Row, compare
from .plan import TUNING_SEED, Study
from .results import Results
from .schedule import Place, best_rate, cell_at, places
from .statistics import smallest_difference
from .tables import interval, table

Section = Callable[[Study, Results, Path], Iterator[str]]
_CLAIMS: dict[str, list[dict[str, str]]] = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text("utf-8"))
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
        documents = {name: len({*one["documents"]}) for name, one in next(iter(made.values()))["questions"].items()}
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
        f"Learning rates, `{study.rates.option}`: every arm tries the same ones for {study.rates.steps} steps; the one "
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
            yield from _claims(name, rows, pairs)

    return section


def _budget_table(rows: Sequence[Row]) -> str:
    def mean(row: Row, key: str) -> float:
        return sum(one[key] for one in row.results.values()) / len(row.results)

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


def _claims(name: str, rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the paper's claims beside this study's differences; those of the base arm alone can be told."""
    by_arm = {row.arm: row for row in rows}
    lines = []
    for claim in _CLAIMS[name]:
        for pair in pairs:
            above, below = by_arm.get(claim["above"]), by_arm.get(claim["below"])
            if above is None or below is None or pair not in below.differences:
                continue
            difference = below.differences[pair]
            verdict = "cannot be told at this size"
            if below.adjusted[pair] < 0.05:
                verdict = "holds" if difference.mean < 0 else "does not hold"
            ours = f"{-difference.mean:+.3f} ({-difference.high:+.3f} to {-difference.low:+.3f})"
            lines.append([claim["claim"], claim["paper"], f"{pair[0]}, {pair[1]}: {ours}", verdict])
    if lines:
        yield "### Claims\n\n" + table(["claim", "the paper's averages", "here, difference", ""], lines)


REPORTS: dict[str, Section] = {
    **{name: _scores(name) for name in _CLAIMS},
    "noise": noise.section,
    "tokens": tokens.section,
    "prune": reduced.section("prune"),
    "collapse": reduced.section("collapse"),
    "forgetting": forgetting.section,
}
"""Section of the report -> what writes it."""
