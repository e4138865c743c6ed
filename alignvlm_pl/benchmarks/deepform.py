"""DeepForm, test: five fields of 300 advertising contracts, F1 over all documents (DUE scorer, DocOwl pipeline)."""

from .base import Benchmark, Scoring, SourceFile

DEEPFORM = Benchmark(
    name="deepform",
    title="DeepForm",
    split="test",
    size=1500,
    scorings=(Scoring(metric="document_f1"),),
    sources=(
        SourceFile(
            file="DeepForm_test.jsonl",
            url="https://huggingface.co/datasets/mPLUG/DocDownstream-1.0",
            format="docdownstream",
        ),
    ),
    licence="public records; DUE benchmark",
    max_new_tokens=64,
    postprocessing="line ends and outer white space deleted; the answer None counts as no answer",
    notes="gold values come from DUE's document.jsonl; 300 documents x 5 fields",
    paper={
        "Qwen2-VL-2B (base+)": 49.31,
        "AlignVLM-Llama-3.2-1B": 60.47,
        "AlignVLM-Llama-3.2-3B": 63.49,
        "DocOwl1.5-8B (base+)": 64.39,
        "Llama3.2-11B (base+)": 67.05,
        "AlignVLM-Llama-3.1-8B": 63.25,
        "3B, MLP connector": 62.07,
        "3B, Perceiver Resampler": 57.08,
        "3B, Ovis": 58.02,
        "3B ALIGN, 3.4K embeddings kept": 63.64,
    },
)
