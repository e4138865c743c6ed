"""TextVQA, validation: questions about text in photographs, ten answers each (Singh et al. 2019)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table

TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    split="val",
    size=5000,
    scorings=(Scoring(metric="vqa_accuracy"),),
    sources=(vlmevalkit_table("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd"),),
    licence="CC BY 4.0",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="punctuation, articles and number words by VQA's rules",
    paper={
        "Qwen2-VL-2B (base+)": 61.01,
        "AlignVLM-Llama-3.2-1B": 48.81,
        "AlignVLM-Llama-3.2-3B": 57.38,
        "DocOwl1.5-8B (base+)": 67.3,
        "Llama3.2-11B (base+)": 68.46,
        "AlignVLM-Llama-3.1-8B": 64.6,
        "3B, MLP connector": 53.56,
        "3B, Perceiver Resampler": 51.33,
        "3B, Ovis": 52.6,
        "3B ALIGN, 3.4K embeddings kept": 57.48,
        "low-data 3B, MLP": 51.97,
        "low-data 3B, Perceiver": 44.31,
        "low-data 3B, Ovis": 55.6,
        "low-data 3B, H-Reducer": 47.13,
        "low-data 3B, HoneyBee": 58.13,
        "low-data 3B, ALIGN": 65.63,
    },
)
