"""MMMU, validation: college exams with images, multiple-choice or open (Yue et al. 2024)."""

from .base import Benchmark, Prompt, Scoring, vlmevalkit_table
from .paper import PAPER

MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    split="validation",
    size=900,
    scorings=(Scoring(metric="multiple_choice", rules=("vlmevalkit", "vlmevalkit-2025-02", "official")),),
    sources=(
        vlmevalkit_table(
            "MMMU_DEV_VAL",
            "585e8ad75e73f75dcad265dfd0417d64",
            "521afc0f3bf341e6654327792781644d",
            contents="1,050 rows, of which the 900 of the validation split are used",
        ),
    ),
    licence="Apache-2.0",
    prompt=Prompt(
        prefix="Question: ",
        suffix="\nChoose the right option and answer with its letter only.",
        options=True,
        place_images=True,
    ),
    max_new_tokens=64,
    postprocessing="the letter or the text of one option is searched",
    only={"split": "validation"},
    notes="scored by rules alone: the reference may ask a judge where its rules do not decide",
    paper=PAPER["mmmu"],
)
