"""ChartQA, test: human and augmented questions about charts (Masry et al. 2022)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table

CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA",
    split="test",
    size=2500,
    scorings=(Scoring(metric="relaxed_accuracy"),),
    sources=(vlmevalkit_table("ChartQA_TEST", "c902e0aa9be5582a7aad6dcf52734b42"),),
    licence="GPL-3.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, per cents and numbers by value",
    groups="split",
    notes="one mean over 1,250 human and 1,250 augmented questions",
    paper={
        "Qwen2-VL-2B (base+)": 68.6,
        "AlignVLM-Llama-3.2-1B": 65.44,
        "AlignVLM-Llama-3.2-3B": 71.88,
        "DocOwl1.5-8B (base+)": 65.8,
        "Llama3.2-11B (base+)": 71.4,
        "AlignVLM-Llama-3.1-8B": 75.0,
        "3B, MLP connector": 66.48,
        "3B, Perceiver Resampler": 65.16,
        "3B, Ovis": 67.92,
        "3B ALIGN, 3.4K embeddings kept": 71.72,
        "low-data 3B, MLP": 48.44,
        "low-data 3B, Perceiver": 40.0,
        "low-data 3B, Ovis": 54.52,
        "low-data 3B, H-Reducer": 45.64,
        "low-data 3B, HoneyBee": 55.32,
        "low-data 3B, ALIGN": 69.72,
    },
)
