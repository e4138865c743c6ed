"""Kleister Charity, test: eight fields of 609 annual reports, F1 over all documents (DUE scorer, DocOwl pipeline)."""

from .base import Benchmark, Scoring, docdownstream
from .paper import PAPER

KLC = Benchmark(
    name="klc",
    title="KLC",
    split="test",
    size=4872,
    scorings=(Scoring(metric="document_f1"),),
    sources=(docdownstream("KleisterCharity"),),
    licence="Crown copyright, open; DUE benchmark",
    max_new_tokens=64,
    postprocessing="line ends and outer white space deleted; the prediction None counts as none",
    notes="gold values come from DUE's document.jsonl; 609 documents x 8 fields",
    paper=PAPER["klc"],
)
