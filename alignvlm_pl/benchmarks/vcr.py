"""VCR-wiki, English: restore text that is covered but for a thin strip (Zhang et al. 2024)."""

from .base import Benchmark, Scoring, SourceFile


def _table(name: str, md5: str) -> SourceFile:
    url = f"https://huggingface.co/datasets/vcr-org/{name}/resolve/main/{name}.tsv"
    return SourceFile(file=f"{name}.tsv", url=url, format="vlmevalkit-tsv", md5=(md5,))


VCR_EASY = Benchmark(
    name="vcr_easy",
    title="VCR en easy",
    split="test",
    size=5000,
    scorings=(Scoring(metric="vcr"),),
    sources=(_table("VCR-wiki-en-easy-test", "8a9b96885f251d1c85f42f84073327f1"),),
    licence="CC BY-SA 4.0",
    max_new_tokens=120,
    postprocessing="what follows the last `Assistant: `, cut into spaCy's tokens",
    notes="means over all covered texts, not over images; the paper does not name its subset",
    paper={
        "3B, ALIGN": 65.84,
        "3B, MLP connector": 51.43,
    },
)

VCR_HARD = Benchmark(
    name="vcr_hard",
    title="VCR en hard",
    split="test",
    size=5000,
    scorings=(Scoring(metric="vcr"),),
    sources=(_table("VCR-wiki-en-hard-test", "2d8b8b1ee0eba0e0b618fd3aa7d9710e"),),
    licence="CC BY-SA 4.0",
    max_new_tokens=120,
    postprocessing="what follows the last `Assistant: `, cut into spaCy's tokens",
    notes="means over all covered texts, not over images; the paper does not name its subset",
    paper={
        "3B, ALIGN": 48.07,
        "3B, MLP connector": 37.89,
    },
)
