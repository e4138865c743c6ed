"""GQA, testdev-balanced: compositional questions about photographs (Hudson and Manning 2019)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, Source

GQA = Benchmark(
    name="gqa",
    title="GQA",
    split="testdev-balanced",
    size=12578,
    scorings=(Scoring(metric="gqa"),),
    sources=(
        Source(
            file="GQA_TestDev_Balanced.tsv",
            url="https://opencompass.openxlab.space/utils/VLMEval/GQA_TestDev_Balanced.tsv",
            format="vlmevalkit-tsv",
        ),
    ),
    licence="CC BY 4.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, letter case ignored",
    paper={
        "low-data 3B, MLP": 57.62,
        "low-data 3B, Perceiver": 55.86,
        "low-data 3B, Ovis": 56.23,
        "low-data 3B, H-Reducer": 58.24,
        "low-data 3B, HoneyBee": 54.79,
        "low-data 3B, ALIGN": 61.67,
    },
)
