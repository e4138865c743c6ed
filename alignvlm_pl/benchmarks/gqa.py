"""GQA, testdev-balanced: compositional questions about photographs (Hudson and Manning 2019)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

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
    paper=PAPER["gqa"],
)
