"""TableVQA-Bench: the scores of its four parts, and their unweighted mean.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/tablevqabench.py` after the clean-up of
`TableVQABench.evaluate` (`-2025-02`: 282a0afc, the same); `official` = naver-ai/tablevqabench 87d38e79,
`src/evaluate_tablevqa_dataset.py`. Neither prints the mean, which the AlignVLM paper reports.
"""

import re
from collections import Counter
from collections.abc import Sequence

from alignvlm_pl.errors import DataError, require_known

from .base import EvalSample, Metric, Statistics, check_rule, share
from .wtq import normalise_item, split_bars, wtq

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "official")
PARTS = ("vwtq", "vwtq_syn", "vtabfact", "fintabnetqa")

_CUE = "Answer: "
_SIGNS = str.maketrans("", "", "$(),")
_MEASURES = "dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe"
_MEASURE = re.compile(rf"\b(?:{_MEASURES})s?\b")
_SCALES = {r" ?\bthousand\b": "e3", r" ?\bmillion\b": "e6", r" ?\bbillion\b": "e9", r" ?%": "e-2"}

Reading = tuple[float, float] | tuple[str, str]
"""A text with its units applied, and without them: two numbers, or two texts."""


def tablevqa(
    prediction: str, references: Sequence[str], *, part: str, exact: bool = False, rule: str = "vlmevalkit"
) -> float:
    """Return 1 if the prediction is correct by the rules of its part, else 0.

    vwtq and vwtq_syn compare denotations (`wtq`), vtabfact the words true and false, fintabnetqa numbers with units. A
    leading `Answer: ` is removed from the prediction, except under `official`.

    References are items joined by `|`, as in the data; of vtabfact `1` or `0`. With `exact`, 5 is not 5 million.

    Raises:
        DataError: There is no such part.
    """
    check_rule("tablevqa", rule, RULES)
    require_known(part, PARTS, f"tablevqa: there is no part {part!r}", DataError)
    if rule != "official":
        prediction = prediction.removeprefix(_CUE)
    if part == "vtabfact":
        return float(any(verdict(prediction) == reference for reference in references))
    if part == "fintabnetqa":
        return float(any(_equal(read_amount(prediction), read_amount(text), exact) for text in references))
    return max((wtq(prediction, split_bars(text), rule="vlmevalkit") for text in references), default=0.0)


def verdict(prediction: str) -> str | None:
    """Return `1` or `0` if the prediction contains true or false, even inside a word; None if neither or both."""
    reply = prediction.lower()
    if ("true" in reply) == ("false" in reply):
        return None
    return "1" if "true" in reply else "0"


def read_amount(text: str) -> Reading:
    """Parse a text of fintabnetqa with its units applied, and with its units removed."""
    text = _MEASURE.sub("", normalise_item(text).translate(_SIGNS))
    scaled = unscaled = text
    for pattern, factor in _SCALES.items():
        scaled, unscaled = re.sub(pattern, factor, scaled), re.sub(pattern, "", unscaled)
    try:
        return float(scaled), float(unscaled)
    except ValueError:
        return scaled, unscaled


def _equal(found: Reading, gold: Reading, exact: bool) -> bool:
    if exact:
        return found[0] == gold[0]
    return any(one == other for one in found for other in gold)


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    sums: Counter[str] = Counter()
    for sample in samples:
        part = str(sample.meta.get("split", ""))
        sums[f"right/{part}"] += int(tablevqa(sample.prediction, sample.references, part=part, rule=rule))
        sums[f"count/{part}"] += 1
        if part == "fintabnetqa":
            exact = tablevqa(sample.prediction, sample.references, part=part, exact=True, rule=rule)
            sums["exact/fintabnetqa"] += int(exact)
    return {name: float(value) for name, value in sums.items()}


def _scores(sums: Statistics) -> dict[str, float]:
    counts = {part: sums[f"count/{part}"] for part in PARTS if sums.get(f"count/{part}")}
    parts = {part: sums.get(f"right/{part}", 0.0) / count for part, count in counts.items()}
    scores = {"mean": share(sum(parts.values()), len(parts)), **parts}
    if "fintabnetqa" in parts:
        scores["fintabnetqa_exact"] = sums.get("exact/fintabnetqa", 0.0) / counts["fintabnetqa"]
    return scores


_EQUAL = {"vlmevalkit-2025-02": "vlmevalkit"}
TABLEVQA = Metric(name="tablevqa", rules=RULES, statistics=_statistics, scores=_scores, equal_rules=_EQUAL)
