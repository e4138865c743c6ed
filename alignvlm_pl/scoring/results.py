"""What `results.json` holds."""

from collections.abc import Collection, Mapping
from typing import Any

from .run import Scored


def results(
    found: Mapping[str, Scored],
    *,
    losses: Mapping[str, float] | None = None,
    readout_sets: Collection[str] = (),
) -> dict[str, Any]:
    """Put the figures of all sets together.

    Args:
        found: Name of the set -> what came out.
        losses: Name of the set -> loss per token in nats.
        readout_sets: Sets that are read and not asked; they have no part in the overall figures.

    Returns:
        `overall` (means over the questions of the sets that are no registered benchmark), `benchmarks` (`num` and
        figures as fractions of 1), `loss`, `intervals`, `incomplete` (problems) and `reference_prompts`.
    """
    figures = {name: {"num": scored.num, **scored.figures} for name, scored in found.items()}
    own = [name for name, scored in found.items() if not scored.benchmark.size and name not in readout_sets]
    prompts = {name: scored.benchmark.prompts_are_reference() for name, scored in found.items()}
    return {
        "overall": overall({name: figures[name] for name in own}),
        "benchmarks": figures,
        "loss": dict(losses or {}),
        "intervals": {name: scored.intervals for name, scored in found.items()},
        "incomplete": {name: scored.problems for name, scored in found.items() if scored.problems},
        "reference_prompts": {name: parts for name, parts in prompts.items() if parts},
    }


def overall(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the questions of several sets of the same metrics: those the first of them has.

    Args:
        results: Name -> `num` and figures.
    """
    total = sum(figures["num"] for figures in results.values())
    if not total:
        return {}
    names = [name for name in next(iter(results.values())) if name != "num"]
    means = {name: sum(f[name] * f["num"] for f in results.values() if f["num"]) / total for name in names}
    return {"num": total, **means}
