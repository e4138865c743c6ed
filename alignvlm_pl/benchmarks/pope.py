"""POPE: is an object in the image? Random, popular and adversarial questions (Li et al. 2023)."""

from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.pope import split_categories

from .base import Benchmark, Scoring, vlmevalkit_table
from .paper import PAPER


def categories(sample: EvalSample) -> int:
    """Return the number of questions that a prediction counts as: one per category, which are stored once."""
    return len(split_categories(sample)) or 1


POPE = Benchmark(
    name="pope",
    title="POPE",
    split="test",
    size=9000,
    scorings=(Scoring(metric="pope"),),
    sources=(
        vlmevalkit_table(
            "POPE",
            "c12f5acb142f2ef1f85a26ba2fbe41d5",
            contents="a row for each distinct question; they count as 9,000",
        ),
    ),
    licence="MIT",
    max_new_tokens=64,
    postprocessing="punctuation left out; the words yes and no are searched",
    count=categories,
    notes="headline: F1 over all 9,000 questions; a prediction with neither or both words is never right",
    paper=PAPER["pope"],
)
