"""MM-Vet: open predictions scored from 0 to 1 by a judge model.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/mmvet.py` (`-2025-02`: 282a0afc, the same). Its
judge is gpt-4-turbo. Without a judge there is no score.
"""

import math
from collections.abc import Sequence

from alignvlm_pl.errors import ConfigError, DataError

from .base import EvalSample, Metric, Statistics, share

RULES = ("vlmevalkit", "vlmevalkit-2025-02")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    values_by_name: dict[str, list[float]] = {}
    for sample in samples:
        score = _judged(sample)
        capabilities = [name.strip() for name in str(sample.meta.get("category", "")).split(",")]
        # The reference implementation keeps capabilities and their combinations in one table, so a question with a
        # single capability counts twice in that capability's score.
        for name in ("score", *(name for name in CAPABILITIES if name in capabilities), "_".join(capabilities)):
            values_by_name.setdefault(name, []).append(score)
    totals = {f"total/{name}": math.fsum(values) for name, values in values_by_name.items()}
    return totals | {f"count/{name}": float(len(values)) for name, values in values_by_name.items()}


def _judged(sample: EvalSample) -> float:
    judged = sample.meta.get("judged")
    if judged is None:
        raise ConfigError(
            f"mmvet: {sample.key!r} has no score of a judge; expected meta['judged'] from 0 to 1. MM-Vet is scored "
            "by a judge model only: leave the benchmark out, or add the judge's scores"
        )
    if isinstance(judged, bool) or not isinstance(judged, int | float) or judged < 0 or judged > 1:
        raise DataError(f"mmvet: {sample.key!r}: expected a score from 0 to 1 in meta['judged'], found {judged!r:.60}")
    return float(judged)


def _scores(sums: Statistics) -> dict[str, float]:
    found = sorted(name.removeprefix("count/") for name in sums if name.startswith("count/"))
    names = dict.fromkeys(["score", *(name for name in CAPABILITIES if name in found), *found])
    return {name: share(sums.get(f"total/{name}", 0.0), sums.get(f"count/{name}", 0.0)) for name in names}


MMVET = Metric(
    name="mmvet",
    rules=RULES,
    statistics=_statistics,
    scores=_scores,
    equal_rules={RULES[1]: RULES[0]},
    needs_judge=True,
)
