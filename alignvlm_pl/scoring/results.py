"""The content of `results.json`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .run import Scored


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Losses of datasets.

    Attributes:
        values: Name of the dataset -> loss per supervised token in nats.
        problems: Name -> why the loss is that of a part of the dataset.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    problems: Mapping[str, list[str]] = field(default_factory=dict)


def results(
    found: Mapping[str, Scored],
    *,
    loss: Losses | None = None,
    readout_sets: Collection[str] = (),
) -> dict[str, Any]:
    """Collect the scores of all datasets.

    Args:
        found: Name of the dataset -> its scores.
        loss: Losses of the `val` datasets.
        readout_sets: Datasets that are read from P_vocab; they do not count in the overall scores.

    Returns:
        `overall` (means over the questions of custom datasets), `benchmarks` (`num` and scores as fractions of 1),
        `loss`, `intervals`, `incomplete` (problems) and `reference_prompts`.
    """
    loss = loss or Losses()
    scores = {name: {"num": scored.num, **scored.metrics} for name, scored in found.items()}
    custom = [name for name, scored in found.items() if not scored.benchmark.size and name not in readout_sets]
    prompts = {name: scored.benchmark.prompts_are_reference() for name, scored in found.items()}
    return {
        "overall": overall({name: scores[name] for name in custom}),
        "benchmarks": scores,
        "loss": dict(loss.values),
        "intervals": {name: scored.intervals for name, scored in found.items()},
        "incomplete": {
            **{name: scored.problems for name, scored in found.items() if scored.problems},
            **{f"loss of {name}": problems for name, problems in loss.problems.items()},
        },
        "reference_prompts": {name: parts for name, parts in prompts.items() if parts},
    }


def overall(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means over the questions of several datasets, of the metrics that all of them have.

    Args:
        results: Name -> `num` and scores; a dataset of which nothing is scored does not count.
    """
    scored = [scores for scores in results.values() if scores["num"] and len(scores) > 1]
    if not scored:
        return {}
    total = sum(scores["num"] for scores in scored)
    names = [name for name in scored[0] if name != "num" and all(name in scores for scores in scored)]
    return {"num": total, **{name: sum(f[name] * f["num"] for f in scored) / total for name in names}}
