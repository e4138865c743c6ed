"""InfographicVQA, validation: questions about infographics (Mathew et al. 2022)."""

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, vlmevalkit_table

INFOVQA = Benchmark(
    name="infovqa",
    title="InfoVQA",
    split="val",
    size=2801,
    scorings=(Scoring(metric="anls"),),
    sources=(vlmevalkit_table("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe"),),
    licence="research only, rrc.cvc.uab.es",
    prompt=Prompt(suffix=SHORT_ANSWER),
    max_new_tokens=64,
    postprocessing="outer white space trimmed, inner collapsed, letter case ignored",
    paper={
        "Qwen2-VL-2B (base+)": 31.88,
        "AlignVLM-Llama-3.2-1B": 38.16,
        "AlignVLM-Llama-3.2-3B": 44.53,
        "DocOwl1.5-8B (base+)": 47.62,
        "Llama3.2-11B (base+)": 44.27,
        "AlignVLM-Llama-3.1-8B": 53.75,
        "3B, MLP connector": 37.56,
        "3B, Perceiver Resampler": 34.13,
        "3B, Ovis": 42.11,
        "3B ALIGN, 3.4K embeddings kept": 44.13,
        "low-data 3B, MLP": 19.93,
        "low-data 3B, Perceiver": 18.1,
        "low-data 3B, Ovis": 26.39,
        "low-data 3B, H-Reducer": 17.57,
        "low-data 3B, HoneyBee": 19.36,
        "low-data 3B, ALIGN": 30.5,
    },
)
