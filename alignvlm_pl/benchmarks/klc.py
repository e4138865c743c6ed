"""Kleister Charity, test: eight fields of 609 annual reports, F1 over all documents (DUE scorer, DocOwl pipeline)."""

from .base import Benchmark, Scoring, SourceFile

KLC = Benchmark(
    name="klc",
    title="KLC",
    split="test",
    size=4872,
    scorings=(Scoring(metric="document_f1"),),
    sources=(
        SourceFile(
            file="KleisterCharity_test.jsonl",
            url="https://huggingface.co/datasets/mPLUG/DocDownstream-1.0",
            format="docdownstream",
        ),
    ),
    licence="Crown copyright, open; DUE benchmark",
    max_new_tokens=64,
    postprocessing="line ends and outer white space deleted; the answer None counts as no answer",
    notes="gold values come from DUE's document.jsonl; 609 documents x 8 fields",
    paper={
        "Qwen2-VL-2B (base+)": 34.39,
        "AlignVLM-Llama-3.2-1B": 33.71,
        "AlignVLM-Llama-3.2-3B": 35.25,
        "DocOwl1.5-8B (base+)": 36.93,
        "Llama3.2-11B (base+)": 37.22,
        "AlignVLM-Llama-3.1-8B": 35.5,
        "3B, MLP connector": 33.36,
        "3B, Perceiver Resampler": 31.75,
        "3B, Ovis": 33.5,
        "3B ALIGN, 3.4K embeddings kept": 35.02,
    },
)
