"""The content of `results.json`."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .run import Scored


class Losses(NamedTuple):
    """Name of a dataset -> loss per supervised token in nats, and -> why it is that of a part of the dataset."""

    values: Mapping[str, float]
    problems: Mapping[str, list[str]]


_NONE = Losses({}, {})


def results(
    found: Mapping[str, Scored],
    *,
    loss: Losses = _NONE,
    readout_sets: Collection[str] = (),
) -> dict[str, Any]:
    """Collect the scores of all datasets, and the losses of the `val` datasets.

    Returns:
        `overall` (means over the questions of custom datasets, but for the `readout_sets`, which are read from
        P_vocab), `benchmarks` (`num` and scores as fractions of 1), `loss`, `intervals`, `incomplete` (problems) and
        `reference_prompts`.
    """
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
    """Return the means of the metrics that all datasets have over all their questions, from `num` and scores of each.

    A dataset of which nothing is scored does not count.
    """
    scored = [scores for scores in results.values() if scores["num"] and len(scores) > 1]
    if not scored:
        return {}
    total = sum(scores["num"] for scores in scored)
    names = [name for name in scored[0] if name != "num" and "/" not in name]  # a group's has a slash
    names = [name for name in names if all(name in scores for scores in scored)]
    return {"num": total, **{name: sum(f[name] * f["num"] for f in scored) / total for name in names}}
