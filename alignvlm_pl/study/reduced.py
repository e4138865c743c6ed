"""`prune` (the paper's table 4) and `collapse`: ALIGN with fewer rows of the vocabulary, or the LLM with fewer blanks.

Both change the connector of a trained model and test it, at once and after some further training.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..errors import ConfigError
from ..models.kept_rows import choose_rows
from ..models.pruning import mean_vocabulary, prune, require_align
from ..utils.atomic_files import write_atomically
from . import plots
from .compare import columns
from .measure import NO_VAL, Trained, load_trained, measured, page_tiles
from .plan import Study
from .results import Result, Results, scores_alone
from .statistics import Estimate, estimate
from .tables import interval, table

PAPER = {"prune": "The paper's 3B: 58.81 with all 128,256 rows, 58.69 with 3.4K (table 4).", "collapse": ""}
_NEEDED = {"prune": {"counts", "masses"}, "collapse": {"masses", "tokens", "min_run"}}
_TITLES = {"prune": "Rows of the vocabulary", "collapse": "Blanks left out"}
_ROUNDS = 5


def measure_prune(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Test with fewer rows; return points of `rows`, `mass`, `steps`, `questions`, `seconds` and `megabytes`.

    The first points are those of all rows. Settings: `counts` and `masses`, the rows to keep by number and by share of
    P_vocab over `pages`; `steps`, numbers of steps of further training, of which 0 is none. `seconds` is the
    connector's forward run on a page, `megabytes` its weights in float32 and the text embeddings that it averages.
    """
    _check("prune", settings)
    net, processor = load_trained(trained)
    if not net.connector.reads_text:
        return []
    tiles = page_tiles(trained, processor, settings["pages"])
    means, _ = mean_vocabulary(net, tiles)
    ids = require_align(net).row_ids()
    # The same points for every seed, though the rows that carry a mass differ.
    asked = [
        {"count": len(ids)},
        *({"count": n} for n in settings["counts"]),
        *({"mass": m} for m in settings["masses"]),
    ]
    points = []
    for one in asked:
        places, mass = choose_rows(means, **one)
        kept = [ids[place] for place in places]
        smaller, _ = load_trained(trained)
        prune(smaller, kept)
        cost = {"seconds": _seconds(smaller, tiles[0]), "megabytes": _megabytes(smaller.connector)}
        for steps in settings["steps"]:
            questions = _test_variant(trained, run, "prune", {"vocab_rows": None, "vocab_keep": kept}, steps)
            points.append({"rows": len(kept), "mass": mass, "steps": steps, **cost, "questions": questions})
    return points


def measure_collapse(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Test with blanks left out; return points of `mass`, `kept` (share of visual tokens), `steps` and `questions`.

    Settings: `masses`, `tokens` and `min_run` of the connector's option `collapse`; `steps` and `pages` as of `prune`.
    """
    _check("collapse", settings)
    net, processor = load_trained(trained)
    if not net.connector.reads_text:
        return []
    tiles, points = page_tiles(trained, processor, settings["pages"]), []
    for mass in settings["masses"]:
        option = {"mass": mass, "tokens": settings["tokens"], "min_run": settings["min_run"]}
        kept = _kept_share(trained, option, tiles)
        for steps in settings["steps"]:
            questions = _test_variant(trained, run, "collapse", {"collapse": option}, steps)
            points.append({"mass": mass, "kept": kept, "steps": steps, "questions": questions})
    return points


def _check(name: str, settings: Mapping[str, Any]) -> None:
    needed = _NEEDED[name] | {"steps", "pages"}
    if settings.keys() != needed:
        raise ConfigError(f"measures.{name}={dict(settings)}: expected {', '.join(sorted(needed))}")


def _test_variant(
    trained: Trained, run: Callable[..., None], name: str, options: Mapping[str, Any], steps: int
) -> dict[str, dict[str, list[Any]]]:
    """Return the scores with other options of the connector, after some steps of further training."""
    changed = {**trained.spec.connector, **options}
    text = yaml.safe_dump({key: value for key, value in changed.items() if value is not None})
    folder = trained.measures / f"{name}-{hashlib.sha256(f'{text}{steps}'.encode()).hexdigest()[:12]}"
    file, last = folder / "connector.yaml", trained.stages[-1]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    config, weights = ("--config", str(last / "config.yaml"), "--connector", str(file)), last / "hf"
    if steps:
        weights = folder / "fit" / "hf"
        if not weights.is_dir():
            start = ("--stage.init_from", str(last / "hf"), "--stage.parent=null", f"--stage.max_steps={steps}")
            run("fit", *config, *start, "--run_dir", str(folder / "fit"))
    tested = folder / "test"
    if not (tested / "results.json").is_file():
        run("test", *config, "--model.weights", str(weights), *NO_VAL, "--run_dir", str(tested))
    return scores_alone(tested)


@torch.inference_mode()
def _seconds(net: Any, tiles: Tensor) -> float:
    """Return the time of the connector's forward run on a page, the median of some."""
    features, weight = net.encode_images(tiles.to(net.device)), net.get_input_embeddings().weight
    times = []
    for _ in range(_ROUNDS):
        started = perf_counter()
        net.connector(features, weight)
        if features.is_cuda:
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    return median(times)


def _megabytes(connector: Any) -> float:
    values = sum(parameter.numel() for parameter in connector.parameters())
    return 4e-6 * (values + connector.rows * connector.w1.out_features)


@torch.inference_mode()
def _kept_share(trained: Trained, option: Mapping[str, Any], tiles: Sequence[Tensor]) -> float:
    net, _ = load_trained(trained, collapse=option)
    if (collapse := net.collapse) is None:
        return 1.0
    kept = []
    for one in tiles:
        log_probs = net.connector.log_probs(net.encode_images(one.to(net.device)), collapse.tokens)
        kept.append(collapse.kept(log_probs, net.grid).cpu())
    return float(torch.cat(kept).float().mean())


def section(name: str) -> Callable[[Study, Results, Path], Iterator[str]]:
    """Return what writes the section of `prune` or `collapse`."""
    size = {"prune": "rows", "collapse": "kept"}[name]
    label = {"prune": "rows kept", "collapse": "share of visual tokens kept"}[name]

    def write(study: Study, results: Results, folder: Path) -> Iterator[str]:
        yield f"## {_TITLES[name]}\n\n{PAPER[name]}".rstrip()
        head = ["arm", "score", "further steps", label, "mean", "less the trained model", "mass"]
        rows: list[list[str]] = []
        curves: dict[str, list[tuple[float, plots.Interval]]] = {}
        found = measured(study, name, results)
        for arm, by_seed in found.items():
            reading = {seed: one for seed, one in by_seed.items() if one["measures"][name]["found"]}
            for dataset, metric in columns(reading):
                for point, own, less in _points(reading, name, dataset, metric):
                    place = fmean(one[size] for one in point)
                    shown = f"{place:.0f}" if name == "prune" else f"{place:.3f}"
                    line = [arm, f"{dataset}: {metric}", str(point[0]["steps"]), shown, interval(own)]
                    rows.append([*line, interval(less, sign=True), f"{fmean(one['mass'] for one in point):.4f}"])
                    key = f"{arm}, {metric}, {point[0]['steps']} steps"
                    curves.setdefault(key, []).append((place, (own.mean, own.low, own.high)))
        if not rows:
            yield "No arm with P_vocab has been measured."
            return
        yield table(head, rows)
        if without := [arm for arm, by_seed in found.items() if by_seed and arm not in {row[0] for row in rows}]:
            yield f"Without P_vocab, and not measured: {', '.join(without)}."
        if name == "prune":
            yield _costs(study, results)
        curves = {key: sorted(points) for key, points in curves.items()}
        plots.lines(folder / f"{name}.svg", _TITLES[name], label, "score", curves, log=name == "prune")
        yield f"![{_TITLES[name]}]({name}.svg)"

    return write


def _points(
    by_seed: Mapping[int, Result], name: str, dataset: str, metric: str
) -> Iterator[tuple[list[Any], Estimate, Estimate]]:
    """Yield the same point of all seeds, its score, and the difference from the trained model's."""
    results = list(by_seed.values())
    documents = results[0]["questions"][dataset]["documents"]
    plain = np.asarray([one["questions"][dataset][metric] for one in results], dtype=float)
    for point in zip(*(one["measures"][name]["found"] for one in results), strict=True):
        own = np.asarray([one["questions"][dataset][metric] for one in point], dtype=float)
        yield list(point), estimate(own, documents), estimate(own - plain, documents)


def _costs(study: Study, results: Results) -> str:
    rows = []
    for arm, by_seed in measured(study, "prune", results).items():
        for point in zip(*(one["measures"]["prune"]["found"] for one in by_seed.values()), strict=True):
            cost = [fmean(one[key] for one in point) for key in ("rows", "seconds", "megabytes")]
            line = [arm, f"{cost[0]:.0f}", f"{1000 * cost[1]:.3g}", f"{cost[2]:.3g}"]
            rows.append(line) if line not in rows else None
    return table(["arm", "rows", "ms of the connector a page", "MB of its weights"], rows)
