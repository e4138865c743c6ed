"""VCR-wiki, English: restore text that is covered but for a thin strip (Zhang et al. 2024)."""

from .base import Benchmark, Scoring, SourceFile
from .paper import PAPER


def _vcr(level: str, md5: str) -> Benchmark:
    file = f"VCR-wiki-en-{level}-test"
    url = f"https://huggingface.co/datasets/vcr-org/{file}/resolve/main/{file}.tsv"
    return Benchmark(
        name=f"vcr_{level}",
        title=f"VCR en {level}",
        split="test",
        size=5000,
        scorings=(Scoring(metric="vcr"),),
        sources=(SourceFile(file=f"{file}.tsv", url=url, format="vlmevalkit-tsv", md5=(md5,)),),
        licence="CC BY-SA 4.0",
        max_new_tokens=120,
        postprocessing="what follows the last `Assistant: `, cut into spaCy's tokens",
        notes="means over all covered texts, not over images; the paper does not name its subset",
        paper=PAPER[f"vcr_{level}"],
    )


VCR_EASY = _vcr("easy", "8a9b96885f251d1c85f42f84073327f1")
VCR_HARD = _vcr("hard", "2d8b8b1ee0eba0e0b618fd3aa7d9710e")
