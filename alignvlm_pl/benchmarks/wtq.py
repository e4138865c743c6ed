"""WikiTableQuestions, test: questions about Wikipedia tables, scored by denotation (Pasupat and Liang 2015)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, SourceFile, docdownstream
from .paper import PAPER

WTQ = Benchmark(
    name="wtq",
    title="WTQ",
    split="test",
    size=4344,
    scorings=(Scoring(metric="wtq"),),
    sources=(
        SourceFile(
            file="WikiTableQuestions-1.0.2-compact.zip",
            url="https://github.com/ppasupat/WikiTableQuestions/releases",
            format="wtq",
        ),
        docdownstream("WikiTableQuestions", size=4343),
    ),
    licence="CC BY-SA 4.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="denotation: dates and numbers by value; accents, quotes, citations and final brackets left out",
    notes="the paper's scores are means over 4,343 questions: DocDownstream lacks one",
    paper=PAPER["wtq"],
)
