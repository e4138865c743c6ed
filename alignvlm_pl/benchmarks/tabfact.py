"""TabFact, test: is a statement about a Wikipedia table true (Chen et al. 2020)?"""

from .base import Benchmark, Prompt, Scoring, SourceFile

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
        SourceFile(
            file="TabFact_test.jsonl",
            url="https://huggingface.co/datasets/mPLUG/DocDownstream-1.0",
            format="docdownstream",
            contents="the statements whose table has an image; their number is not published",
        ),
    ),
    licence="CC BY 4.0",
    prompt=Prompt(suffix="\nIs this statement true? Answer with True or False."),
    max_new_tokens=16,
    postprocessing="line ends and outer white space deleted",
    notes="letter case counts; DocDownstream lacks statements whose table has no image",
    paper={
        "Qwen2-VL-2B (base+)": 64.75,
        "AlignVLM-Llama-3.2-1B": 71.31,
        "AlignVLM-Llama-3.2-3B": 78.51,
        "DocOwl1.5-8B (base+)": 72.65,
        "Llama3.2-11B (base+)": 78.04,
        "AlignVLM-Llama-3.1-8B": 83.04,
        "3B, MLP connector": 73.22,
        "3B, Perceiver Resampler": 71.93,
        "3B, Ovis": 76.67,
        "3B ALIGN, 3.4K embeddings kept": 78.83,
    },
)
