"""`noise` (the paper's table 3): scores and outputs with Gaussian noise on the vision features."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from . import plots
from .compare import columns, values
from .measure import NO_VAL, Trained, measured
from .plan import Study
from .results import Result, Results, scores_alone
from .statistics import Estimate, estimate
from .tables import interval, table

PAPER = "the paper's σ = 3: MLP 53.06 to 27.52, cosine distance 0.3938; ALIGN 58.81 to 57.14, 0.0036 (table 3)"
_UNITS = {"absolute": False, "relative": True}


def measure(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Test with each noise; return points of `relative`, `sigma`, `cosine_distance` and `questions`.

    Settings: `absolute` and `relative`, lists of σ in the features' units, and in their standard deviations.
    """
    if not settings or settings.keys() - _UNITS:
        raise ConfigError(f"measures.noise={dict(settings)}: expected lists of numbers, absolute and relative")
    points = []
    for unit, relative in _UNITS.items():
        for sigma in settings.get(unit, ()):
            folder = trained.measures / f"noise-{unit}-{sigma:g}"
            # A test that resumed would draw other noise for the pages that are left.
            shutil.rmtree(folder, ignore_errors=True)
            options = {"sigma": sigma, "relative": relative}
            callback = {"class_path": "callbacks.feature_noise.FeatureNoise", "init_args": options}
            callbacks = f"--trainer.callbacks={json.dumps([callback])}"
            run("test", *trained.test_options, *NO_VAL, callbacks, "--run_dir", str(folder))
            distance = json.loads((folder / "noise.json").read_text("utf-8"))["cosine_distance"]
            points.append({**options, "cosine_distance": distance, "questions": scores_alone(folder)})
    return points


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write a table and two plots for each unit of σ."""
    found = measured(study, "noise", results)
    yield f"## Noise on the vision features\n\nBeside it, {PAPER}."
    for unit, relative in _UNITS.items():
        rows, curves, turns = [], {}, {}
        for arm, by_seed in found.items():
            for dataset, metric in columns(by_seed):
                points = list(_points(by_seed, relative, dataset, metric))
                rows += [
                    [
                        arm,
                        f"{dataset}: {metric}",
                        f"{sigma:g}",
                        interval(score),
                        interval(drop, sign=True),
                        f"{turn:.4f}",
                    ]
                    for sigma, score, drop, turn in points
                ]
                curves[f"{arm}, {metric}"] = [(sigma, (s.mean, s.low, s.high)) for sigma, s, _, _ in points]
                turns[arm] = [(sigma, (turn, turn, turn)) for sigma, _, _, turn in points]
        if not rows:
            continue
        what = "σ in standard deviations of the features" if relative else "σ in the features' units"
        yield f"### {what}\n\n" + table(["arm", "score", "σ", "with noise", "less without", "cosine distance"], rows)
        for name, label, lines in (("score", "score", curves), ("cosine", "cosine distance", turns)):
            plots.lines(folder / f"noise-{unit}-{name}.svg", "noise", what, label, lines)
            yield f"![{label}](noise-{unit}-{name}.svg)"
        yield from _against_base(study, found, relative)


def _against_base(study: Study, found: Mapping[str, Mapping[int, Result]], relative: bool) -> Iterator[str]:
    """Yield how much more an arm loses than the base arm, question by question."""
    rows, base = [], found[study.base]
    for arm, own in found.items():
        both = [seed for seed in study.seeds if seed in own and seed in base]
        if arm == study.base or not both:
            continue
        for dataset, metric in columns({seed: own[seed] for seed in both}):
            documents = own[both[0]]["questions"][dataset]["documents"]
            losses = [_losses(one, both, relative, dataset, metric) for one in (base, own)]
            for sigma in losses[0]:
                more = estimate(losses[1][sigma] - losses[0][sigma], documents)
                verdict = "more" if more.low > 0 else "less" if more.high < 0 else "cannot be told"
                rows.append([arm, f"{dataset}: {metric}", f"{sigma:g}", interval(more, sign=True), verdict])
    if rows:
        head = ["arm", "score", "σ", f"loses more than {study.base} by", f"than {study.base}"]
        yield f"How much more than {study.base} an arm loses:\n\n{table(head, rows)}"


def _losses(
    by_seed: Mapping[int, Result], seeds: list[int], relative: bool, dataset: str, metric: str
) -> dict[float, np.ndarray]:
    """Return σ -> loss of score by the noise (seeds, questions)."""
    clean = values(by_seed, seeds, dataset, metric)
    found = {}
    for index, point in enumerate(by_seed[seeds[0]]["measures"]["noise"]["found"]):
        if point["relative"] is relative:
            same = [by_seed[seed]["measures"]["noise"]["found"][index]["questions"][dataset][metric] for seed in seeds]
            found[point["sigma"]] = clean - np.asarray(same, dtype=float)
    return found


def _points(
    by_seed: Mapping[int, Result], relative: bool, dataset: str, metric: str
) -> Iterator[tuple[float, Estimate, Estimate, float]]:
    """Yield σ, the score with noise, its difference from the one without, and the mean cosine distance."""
    seeds = list(by_seed)
    documents = by_seed[seeds[0]]["questions"][dataset]["documents"]
    clean = values(by_seed, seeds, dataset, metric)
    for index, point in enumerate(by_seed[seeds[0]]["measures"]["noise"]["found"]):
        if point["relative"] is relative:
            same = [by_seed[seed]["measures"]["noise"]["found"][index] for seed in seeds]
            noisy = np.asarray([one["questions"][dataset][metric] for one in same], dtype=float)
            turn = float(np.mean([one["cosine_distance"] for one in same]))
            yield point["sigma"], estimate(noisy, documents), estimate(noisy - clean, documents), turn
