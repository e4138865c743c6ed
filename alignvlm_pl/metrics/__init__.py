"""Scores of predictions against their accepted answers, and a registry of them by name.

Each file holds one metric: a pure function of prediction and references, and the `Metric` made of it, which scores a
corpus under every rule. A rule is named after the reference implementation that it reproduces to the last digit.
Nothing here needs torch.
"""

from alignvlm_pl.errors import ConfigError, nearest

from .anls import ANLS, anls
from .base import Answer, Metric
from .cer import CER, character_error_rate
from .document_f1 import DOCUMENT_F1, annotate, count_fields
from .exact import EXACT_MATCH, exact_match
from .gqa import GQA, gqa
from .mmmu_open import MMMU_OPEN, mmmu_open
from .mmvet import MMVET, judged_score
from .multiple_choice import MULTIPLE_CHOICE, multiple_choice
from .option_letters import chosen_letter
from .pope import POPE, yes_no
from .relaxed import RELAXED_ACCURACY, relaxed_accuracy
from .tabfact import TABFACT, tabfact
from .tablevqa import TABLEVQA, tablevqa
from .vcr import VCR, vcr
from .vlmevalkit_tables import read_references, reload_predictions
from .vqa_accuracy import VQA_ACCURACY, vqa_accuracy
from .wtq import WTQ, wtq

__all__ = [
    "METRICS",
    "Answer",
    "Metric",
    "anls",
    "annotate",
    "character_error_rate",
    "chosen_letter",
    "count_fields",
    "exact_match",
    "get_metric",
    "gqa",
    "judged_score",
    "mmmu_open",
    "multiple_choice",
    "read_references",
    "relaxed_accuracy",
    "reload_predictions",
    "tabfact",
    "tablevqa",
    "vcr",
    "vqa_accuracy",
    "wtq",
    "yes_no",
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ANLS,
        CER,
        DOCUMENT_F1,
        EXACT_MATCH,
        GQA,
        MMMU_OPEN,
        MMVET,
        MULTIPLE_CHOICE,
        POPE,
        RELAXED_ACCURACY,
        TABFACT,
        TABLEVQA,
        VCR,
        VQA_ACCURACY,
        WTQ,
    )
}


def get_metric(name: str) -> Metric:
    """Look a metric up by the name used in configs and TensorBoard tags.

    Args:
        name: A key of `METRICS`.

    Raises:
        ConfigError: The name is unknown; the message lists the known ones.
    """
    if name not in METRICS:
        raise ConfigError(f"there is no metric {name!r}; {nearest(str(name), METRICS)}")
    return METRICS[name]
