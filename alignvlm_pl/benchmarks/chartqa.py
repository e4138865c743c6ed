"""ChartQA, test: human and augmented questions about charts (Masry et al. 2022)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA",
    split="test",
    size=2500,
    scorings=(Scoring(metric="relaxed_accuracy"),),
    sources=(vlmevalkit_table("ChartQA_TEST", "c902e0aa9be5582a7aad6dcf52734b42"),),
    licence="GPL-3.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, per cents and numbers by value",
    groups="split",
    notes="one mean over 1,250 human and 1,250 augmented questions",
    paper=PAPER["chartqa"],
)
