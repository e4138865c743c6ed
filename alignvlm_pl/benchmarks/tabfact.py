"""TabFact, test: is a statement about a Wikipedia table true (Chen et al. 2020)?"""

from .base import Benchmark, Prompt, Scoring, SourceFile, docdownstream
from .paper import PAPER

TABFACT = Benchmark(
    name="tabfact",
    title="TabFact",
    split="test",
    size=12779,
    scorings=(Scoring(metric="tabfact"),),
    sources=(
        SourceFile(
            file="Table-Fact-Checking",
            url="https://github.com/wenhuchen/Table-Fact-Checking",
            format="tabfact",
        ),
        docdownstream("TabFact", contents="the statements whose table has an image; their number is not published"),
    ),
    licence="CC BY 4.0",
    prompt=Prompt(suffix="\nIs this statement true? Answer with True or False."),
    max_new_tokens=16,
    postprocessing="line ends and outer white space deleted",
    notes="letter case counts; DocDownstream lacks statements whose table has no image",
    paper=PAPER["tabfact"],
)
