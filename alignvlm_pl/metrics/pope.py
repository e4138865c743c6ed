"""POPE: yes-or-no questions about objects in an image.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/yorn.py` without a judge;
`vlmevalkit-2025-02` = 282a0afc, which deletes the period of `5.`; `lmms-eval` 75571cfe.
"""

from collections import Counter
from collections.abc import Sequence

from .base import EvalSample, Metric, Statistics, check_rule, f1_score, share
from .vqa_words import without_punctuation

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "lmms-eval")
UNKNOWN = "Unknown"


def yes_no(prediction: str, *, rule: str = "vlmevalkit") -> str:
    """Return `Yes`, `No` or `Unknown` for a prediction.

    The word yes without the word no is `Yes`, and vice versa; under `lmms-eval` there must be no other word.
    """
    check_rule("pope", rule, RULES)
    reply = prediction.lower()
    if rule == "lmms-eval":
        words = {reply.strip()}
    else:
        words = set(without_punctuation(reply, periods_after_digits=rule == "vlmevalkit").split())
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return "Yes" if "yes" in words else "No"


def split_categories(sample: EvalSample) -> list[str]:
    """Return the categories of a question, which counts in each; lmms-eval stores it once for each."""
    return [name.strip() for name in str(sample.meta.get("category", "")).split(",") if name.strip()]


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    counts: Counter[str] = Counter()
    for sample in samples:
        found = yes_no(sample.prediction, rule=rule)
        gold = sample.references[0].strip().capitalize() if sample.references else ""
        outcome = _outcome(found, gold, rule)
        categories = split_categories(sample)
        weight = len(categories) or 1
        for ending, times in [("", weight), *((f"/{name}", 1) for name in categories)]:
            for name in outcome:
                counts[name + ending] += times
            counts[f"count{ending}"] += times
    return {name: float(count) for name, count in counts.items()}


def _outcome(found: str, gold: str, rule: str) -> list[str]:
    """Return the counters to increment: `right`, and `hit`, `miss` or `alarm` for the positive class."""
    names = ["right"] if found == gold else []
    if found == "Yes":
        names.append("hit" if gold == "Yes" else "alarm")
    # lmms-eval counts a miss only for an explicit no.
    elif gold == "Yes" and (rule != "lmms-eval" or found == "No"):
        names.append("miss")
    return names


def _scores(sums: Statistics) -> dict[str, float]:
    scores: dict[str, float] = {}
    endings = [name.removeprefix("count") for name in sums if name.startswith("count")]
    for ending in ["", *sorted(ending for ending in endings if ending)]:
        hits, alarms, misses, right, count = (
            sums.get(name + ending, 0.0) for name in ("hit", "alarm", "miss", "right", "count")
        )
        precision, recall = share(hits, hits + alarms), share(hits, hits + misses)
        scores |= {
            f"f1{ending}": f1_score(precision, recall),
            f"accuracy{ending}": share(right, count),
            f"precision{ending}": precision,
            f"recall{ending}": recall,
        }
    return scores


# F1 of a single question is meaningless if the reference is no.
POPE = Metric(name="pope", rules=RULES, statistics=_statistics, scores=_scores, unit_key="accuracy")
