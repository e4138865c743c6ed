"""POPE: is an object in the picture, yes or no?

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/yorn.py` without a judge;
`vlmevalkit-2025-02` = 282a0afc, which deletes the period of `5.`; `lmms-eval` 75571cfe.
"""

from collections import Counter
from collections.abc import Sequence

from .base import Answer, Metric, Statistics, check_rule, f1_score, share
from .vqa_words import without_punctuation

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "lmms-eval")
UNKNOWN = "Unknown"


def yes_no(prediction: str, *, rule: str = "vlmevalkit") -> str:
    """Read `Yes`, `No` or `Unknown` off a reply.

    The word yes without the word no is a yes, and the reverse; under `lmms-eval` the reply must be nothing else.

    Raises:
        ConfigError: There is no such rule.
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


def split_categories(answer: Answer) -> list[str]:
    """Categories of a question, which is stored once and asked in each of them."""
    return [name.strip() for name in str(answer.meta.get("category", "")).split(",") if name.strip()]


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    counts: Counter[str] = Counter()
    for answer in answers:
        found = yes_no(answer.prediction, rule=rule)
        gold = answer.references[0].strip().capitalize() if answer.references else ""
        outcome = _outcome(found, gold, rule)
        categories = split_categories(answer)
        # A question stands once in the data but counts in each of its categories; lmms-eval has it several times.
        weight = len(categories) or 1
        for ending, times in [("", weight), *((f"/{name}", 1) for name in categories)]:
            for name in outcome:
                counts[name + ending] += times
            counts[f"count{ending}"] += times
    return {name: float(count) for name, count in counts.items()}


def _outcome(found: str, gold: str, rule: str) -> list[str]:
    """What the reply adds to: `right`, and for questions about the positive class `hit`, `miss` or `alarm`."""
    names = ["right"] if found == gold else []
    if found == "Yes":
        names.append("hit" if gold == "Yes" else "alarm")
    # lmms-eval counts as missed only what was denied in so many words.
    elif gold == "Yes" and (rule != "lmms-eval" or found == "No"):
        names.append("miss")
    return names


def _figures(sums: Statistics) -> dict[str, float]:
    figures: dict[str, float] = {}
    endings = [name.removeprefix("count") for name in sums if name.startswith("count")]
    for ending in ["", *sorted(ending for ending in endings if ending)]:
        hits, alarms, misses, right, count = (
            sums.get(name + ending, 0.0) for name in ("hit", "alarm", "miss", "right", "count")
        )
        precision, recall = share(hits, hits + alarms), share(hits, hits + misses)
        figures |= {
            f"f1{ending}": f1_score(precision, recall),
            f"accuracy{ending}": share(right, count),
            f"precision{ending}": precision,
            f"recall{ending}": recall,
        }
    return figures


# F1 of one question says nothing where the answer is no.
POPE = Metric(name="pope", rules=RULES, statistics=_statistics, figures=_figures, unit_figure="accuracy")
