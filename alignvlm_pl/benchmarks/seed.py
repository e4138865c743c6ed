"""SEED-Bench, its image questions: four options each (Li et al. 2023)."""

from .base import Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

SEED = Benchmark(
    name="seed",
    title="SEED-Bench image",
    split="test",
    size=14232,
    scorings=(Scoring(metric="multiple_choice"),),
    sources=(vlmevalkit_table("SEEDBench_IMG", folder="benchmarks/SEEDBench"),),
    licence="CC BY-NC 4.0",
    prompt=Prompt(
        prefix="Question: ", suffix="\nChoose the right option and answer with its letter only.", options=True
    ),
    max_new_tokens=64,
    postprocessing="the letter or the text of one option is searched",
    notes="scored by rules alone: the reference may ask a judge where its rules do not decide",
    paper=PAPER["seed"],
)
