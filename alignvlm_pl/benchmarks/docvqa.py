"""DocVQA, validation: questions about scanned business documents (Mathew et al. 2021)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table

DOCVQA = Benchmark(
    name="docvqa",
    title="DocVQA",
    split="val",
    size=5349,
    scorings=(Scoring(metric="anls"),),
    sources=(vlmevalkit_table("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf"),),
    licence="research only, rrc.cvc.uab.es",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, inner collapsed, letter case ignored",
    paper={
        "Qwen2-VL-2B (base+)": 57.23,
        "AlignVLM-Llama-3.2-1B": 72.42,
        "AlignVLM-Llama-3.2-3B": 79.63,
        "DocOwl1.5-8B (base+)": 78.7,
        "Llama3.2-11B (base+)": 78.99,
        "AlignVLM-Llama-3.1-8B": 81.18,
        "3B, MLP connector": 71.46,
        "3B, Perceiver Resampler": 69.08,
        "3B, Ovis": 74.68,
        "3B ALIGN, 3.4K embeddings kept": 79.4,
        "low-data 3B, MLP": 42.11,
        "low-data 3B, Perceiver": 32.18,
        "low-data 3B, Ovis": 57.73,
        "low-data 3B, H-Reducer": 34.59,
        "low-data 3B, HoneyBee": 55.86,
        "low-data 3B, ALIGN": 71.43,
    },
)
