"""DeepForm, test: five fields of 300 advertising contracts, F1 over all documents (DUE scorer, DocOwl pipeline)."""

from .base import Benchmark, Scoring, docdownstream
from .paper import PAPER

DEEPFORM = Benchmark(
    name="deepform",
    title="DeepForm",
    split="test",
    size=1500,
    scorings=(Scoring(metric="document_f1"),),
    sources=(docdownstream("DeepForm"),),
    licence="public records; DUE benchmark",
    max_new_tokens=64,
    postprocessing="line ends and outer white space deleted; the prediction None counts as none",
    notes="gold values come from DUE's document.jsonl; 300 documents x 5 fields",
    paper=PAPER["deepform"],
)
