"""VCR: restoration of covered texts in an image.

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

from .base import EvalSample, Metric, Statistics, check_rule, share

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "official", "lmms-eval")
_REFUSALS = ("I can't", "I cannot", "无法", "抱歉")
_ROLE = "Assistant: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Blank:
    """Scores of one covered text against `best`, an n-gram of the prediction, empty where there is none, from 0 to 1.

    Equality of the tokens, Jaccard index and F1 of their sets, and `difflib.SequenceMatcher`'s ratio of the texts.
    """

    exact_match: float = 0.0
    jaccard: float = 0.0
    f1: float = 0.0
    best: str = ""
    similarity: float = 0.0


def vcr(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> list[Blank]:
    """Score each covered text of one image.

    Each is compared with the most similar n-gram of the prediction, n being its number of tokens, among those that
    share a token with it. Of the prediction, what follows its last `Assistant: ` is scored; a refusal scores 0 for all
    texts. All rules agree.
    """
    check_rule("vcr", rule, RULES)
    reply = prediction.rsplit(_ROLE, maxsplit=1)[-1]
    if "sorry" in reply.lower() or any(mark in reply for mark in _REFUSALS):
        return [Blank() for _ in references]
    tokens = tokenize(reply)
    return [_blank(tokens, reference) for reference in references]


def tokenize(text: str) -> list[str]:
    """Tokenize English text with spaCy; case is kept, and runs of spaces are tokens."""
    return [token.text for token in _tokenizer()(text)]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    # Imported here because spaCy imports torch if it is installed.
    try:
        import spacy
    except ImportError as error:
        raise ConfigError("VCR's scores need spaCy's tokenizer: pip install 'alignvlm_pl[benchmarks]'") from error

    # The tokenizer's rules equal those of the trained pipeline that the reference implementations load.
    return spacy.blank("en").tokenizer


def _blank(tokens: Sequence[str], covered: str) -> Blank:
    expected = tokenize(covered)
    common = set(expected)
    matcher = SequenceMatcher(None, "", covered)

    def similarity(ngram: Sequence[str]) -> float:
        matcher.set_seq1(" ".join(ngram))
        return matcher.ratio()

    ngrams = (tokens[start : start + len(expected)] for start in range(len(tokens) - len(expected) + 1))
    best = max((ngram for ngram in ngrams if not common.isdisjoint(ngram)), key=similarity, default=None)
    if best is None:
        return Blank()
    found = set(best)
    shared = len(found & common)
    return Blank(
        exact_match=float(list(best) == expected),
        jaccard=shared / len(found | common),
        f1=2 * shared / (len(found) + len(common)),
        best=" ".join(best),
        similarity=similarity(best),
    )


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    blanks = [blank for sample in samples for blank in vcr(sample.prediction, sample.references, rule=rule)]
    return {
        "exact_match": sum(blank.exact_match for blank in blanks),
        "jaccard": math.fsum(blank.jaccard for blank in blanks),
        "blanks": len(blanks),
    }


def _scores(sums: Statistics) -> dict[str, float]:
    return {name: share(sums.get(name, 0.0), sums.get("blanks", 0.0)) for name in ("exact_match", "jaccard")}


_EQUAL = dict.fromkeys(RULES[1:], RULES[0])
VCR = Metric(name="vcr", rules=RULES, statistics=_statistics, scores=_scores, equal_rules=_EQUAL)
