"""InfographicVQA, validation: questions about infographics (Mathew et al. 2022)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

INFOVQA = Benchmark(
    name="infovqa",
    title="InfoVQA",
    split="val",
    size=2801,
    scorings=(Scoring(metric="anls"),),
    sources=(vlmevalkit_table("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe"),),
    licence="research only, rrc.cvc.uab.es",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, inner collapsed, letter case ignored",
    paper=PAPER["infovqa"],
)
