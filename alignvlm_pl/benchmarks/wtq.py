"""WikiTableQuestions, test: questions about Wikipedia tables, scored by denotation (Pasupat and Liang 2015)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, SourceFile

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
        SourceFile(
            file="WikiTableQuestions_test.jsonl",
            url="https://huggingface.co/datasets/mPLUG/DocDownstream-1.0",
            format="docdownstream",
            size=4343,
        ),
    ),
    licence="CC BY-SA 4.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="denotation: dates and numbers by value; accents, quotes, citations and final brackets left out",
    notes="the paper's scores are means over 4,343 questions: DocDownstream lacks one",
    paper={
        "Qwen2-VL-2B (base+)": 31.61,
        "AlignVLM-Llama-3.2-1B": 28.66,
        "AlignVLM-Llama-3.2-3B": 38.59,
        "DocOwl1.5-8B (base+)": 35.69,
        "Llama3.2-11B (base+)": 40.18,
        "AlignVLM-Llama-3.1-8B": 45.31,
        "3B, MLP connector": 28.94,
        "3B, Perceiver Resampler": 27.95,
        "3B, Ovis": 33.13,
        "3B ALIGN, 3.4K embeddings kept": 38.26,
    },
)
