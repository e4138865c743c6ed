"""GQA, testdev-balanced: compositional questions about photographs (Hudson and Manning 2019)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table

GQA = Benchmark(
    name="gqa",
    title="GQA",
    split="testdev-balanced",
    size=12578,
    scorings=(Scoring(metric="gqa"),),
    sources=(
        vlmevalkit_table(
            "GQA_TestDev_Balanced", "99b62f22e224d9b2f32dcbe41359d1c9", "fead7df22befc1ed3ca2b62ea26fa17b"
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
