"""DocVQA, validation: questions about scanned business documents (Mathew et al. 2021)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

DOCVQA = Benchmark(
    name="docvqa",
    title="DocVQA",
    split="val",
    size=5349,
    scorings=(Scoring(metric="anls"),),
    sources=(vlmevalkit_table("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf"),),
    licence="research only, rrc.cvc.uab.es",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, inner collapsed, letter case ignored",
    paper=PAPER["docvqa"],
)
