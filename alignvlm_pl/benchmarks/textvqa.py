"""TextVQA, validation: questions about text in photographs, ten references each (Singh et al. 2019)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    split="val",
    size=5000,
    scorings=(Scoring(metric="vqa_accuracy"),),
    sources=(vlmevalkit_table("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd"),),
    licence="CC BY 4.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="punctuation, articles and number words by VQA's rules",
    paper=PAPER["textvqa"],
)
