"""VCR: how well covered pieces of text in a picture were restored.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/vcr.py` (`-2025-02`: 282a0afc, the same);
`official` = tianyu-z/VCR b3be5a9e, `src/evaluation/evaluation_metrics.py`, and `lmms-eval` 75571cfe agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from alignvlm_pl.errors import ConfigError

from .base import Answer, Metric, Statistics, check_rule, share

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "official", "lmms-eval")
_REFUSALS = ("I can't", "I cannot", "无法", "抱歉")
_ROLE = "Assistant: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Blank:
    """How one covered text was restored.

    Attributes:
        exact_match: 1 where the tokens are those of the covered text, else 0.
        jaccard: Common tokens over all tokens, as sets (0-1).
        f1: Harmonic mean of precision and recall of the token sets (0-1).
        best: The piece of the prediction that was compared, its tokens joined by blanks; empty: none.
        similarity: Its ratio of `difflib.SequenceMatcher` to the covered text (0-1).
    """

    exact_match: float = 0.0
    jaccard: float = 0.0
    f1: float = 0.0
    best: str = ""
    similarity: float = 0.0


def vcr(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> list[Blank]:
    """Score each blank of one picture.

    Of all runs of as many tokens as the covered text has, and at least one of them in common with it, the most
    similar one counts, wherever it stands in the prediction. A refusal scores 0 in all blanks.

    Args:
        prediction: The model's answer; what follows its last `Assistant: ` counts.
        references: The covered text of every blank. They are no alternatives: each is scored.
        rule: Reference that is reproduced; all agree.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("vcr", rule, RULES)
    reply = prediction.rsplit(_ROLE, maxsplit=1)[-1]
    if "sorry" in reply.lower() or any(mark in reply for mark in _REFUSALS):
        return [Blank() for _ in references]
    tokens = tokenize(reply)
    return [_blank(tokens, reference) for reference in references]


def tokenize(text: str) -> list[str]:
    """Cut an English text into spaCy's tokens; case is kept, and runs of blanks are tokens."""
    return [token.text for token in _tokenizer()(text)]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    # spaCy loads torch where it finds it: not before it is needed.
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            "VCR's scores need spaCy's tokenizer: pip install 'alignvlm_pl[benchmarks]'"
        ) from error

    # The rules of the tokenizer are those of the trained pipeline, which the references load.
    return spacy.blank("en").tokenizer


def _blank(tokens: Sequence[str], covered: str) -> Blank:
    wanted = tokenize(covered)
    common = set(wanted)
    matcher = SequenceMatcher(None, "", covered)
    best: tuple[float, Sequence[str]] | None = None
    for start in range(len(tokens) - len(wanted) + 1):
        piece = tokens[start : start + len(wanted)]
        if common.isdisjoint(piece):
            continue
        matcher.set_seq1(" ".join(piece))
        ratio = matcher.ratio()
        if best is None or ratio > best[0]:
            best = ratio, piece
    if best is None:
        return Blank()
    similarity, piece = best
    found = set(piece)
    shared = len(found & common)
    return Blank(
        exact_match=float(list(piece) == wanted),
        jaccard=shared / len(found | common),
        f1=2 * shared / (len(found) + len(common)),
        best=" ".join(piece),
        similarity=similarity,
    )


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    blanks = [blank for answer in answers for blank in vcr(answer.prediction, answer.references, rule=rule)]
    return {
        "exact_match": sum(blank.exact_match for blank in blanks),
        "jaccard": math.fsum(blank.jaccard for blank in blanks),
        "blanks": len(blanks),
    }


def _figures(sums: Statistics) -> dict[str, float]:
    return {name: share(sums.get(name, 0.0), sums.get("blanks", 0.0)) for name in ("exact_match", "jaccard")}


VCR = Metric(
    name="vcr",
    rules=RULES,
    statistics=_statistics,
    figures=_figures,
    equal_rules=dict.fromkeys(RULES[1:], RULES[0]),
)
