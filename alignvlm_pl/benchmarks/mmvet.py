"""MM-Vet: open questions scored by a judge model (Yu et al. 2023)."""

from .base import Benchmark, Scoring, vlmevalkit_table
from .paper import PAPER

MMVET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    split="test",
    size=218,
    scorings=(Scoring(metric="mmvet"),),
    sources=(vlmevalkit_table("MMVet", "748aa6d4aa9d4de798306a63718455e3"),),
    licence="Apache-2.0",
    max_new_tokens=512,
    postprocessing="none: the judge reads the prediction",
    notes="needs a judge; without one there is no score",
    paper=PAPER["mmvet"],
)
