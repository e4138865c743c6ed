"""TableVQA-Bench: questions and statements about images of tables, four parts (Kim et al. 2024)."""

from .base import Benchmark, Prompt, Scoring, SourceFile
from .paper import PAPER

_ANSWERS = "\nAnswer with a single word or number. Join several answers with ||."
_WTQ = Prompt(suffix=_ANSWERS, reference_sha256="a68a688b5950f988")
_FACT = Prompt(suffix="\nIs this statement true or false?", reference_sha256="b5e7a743b3466ac2")
_FIN = Prompt(suffix="\nAnswer in few words and give the unit.", reference_sha256="44830a745df459a7")

TABLEVQA = Benchmark(
    name="tablevqa",
    title="TableVQA",
    split="test",
    size=1500,
    scorings=(Scoring(metric="tablevqa"),),
    sources=(
        SourceFile(
            file="tablevqa-bench.tsv",
            url="https://pai-aigc-photog.oss-cn-hangzhou.aliyuncs.com/mentor-vil/datasets/tablevqa-bench.tsv",
            format="vlmevalkit-tsv",
            md5=("2550adc61bdc82d8e62f3b003de7c62d",),
        ),
    ),
    licence="MIT; parts keep those of their sources",
    prompts={"vwtq": _WTQ, "vwtq_syn": _WTQ, "vtabfact": _FACT, "fintabnetqa": _FIN},
    max_new_tokens=64,
    postprocessing="one leading `Answer: ` is left out; then by part",
    list_answers=False,
    notes="unweighted mean of four parts, the relaxed score of fintabnetqa",
    paper=PAPER["tablevqa"],
)
