"""SEED-Bench, its image questions: four options each (Li et al. 2023)."""

from .base import Benchmark, Prompt, Scoring, vlmevalkit_table

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
    postprocessing="the letter or the text of one option is looked for",
    notes="scored by rules alone: the reference may ask a judge where its rules do not decide",
    paper={
        "low-data 3B, MLP": 58.54,
        "low-data 3B, Perceiver": 63.7,
        "low-data 3B, Ovis": 60.97,
        "low-data 3B, H-Reducer": 61.82,
        "low-data 3B, HoneyBee": 61.18,
        "low-data 3B, ALIGN": 63.27,
    },
)
