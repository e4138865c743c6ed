"""The benchmarks of the AlignVLM paper (arXiv 2502.01341) and the scores that it prints."""

from typing import Any

from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.pope import split_categories

from .base import SHORT_ANSWER, Benchmark, Prompt, Scoring, SourceFile, docdownstream, vlmevalkit_table

_LETTER = "\nChoose the right option and answer with its letter only."
_RULES_ALONE = "scored by rules alone: the reference may ask a judge where its rules do not decide"
_OPTION = "the letter or the text of one option is searched"
_SPACE_AND_CASE = "outer white space trimmed, inner collapsed, letter case ignored"
_FIELDS = "line ends and outer white space deleted; the prediction None counts as none"
_TABLE = {  # name -> title, split, number of questions, metric, licence of the data
    "chartqa": ("ChartQA", "test", 2500, "relaxed_accuracy", "GPL-3.0"),
    "deepform": ("DeepForm", "test", 1500, "document_f1", "public records; DUE benchmark"),
    "docvqa": ("DocVQA", "val", 5349, "anls", "research only, rrc.cvc.uab.es"),
    "gqa": ("GQA", "testdev-balanced", 12578, "gqa", "CC BY 4.0"),
    "infovqa": ("InfoVQA", "val", 2801, "anls", "research only, rrc.cvc.uab.es"),
    "klc": ("KLC", "test", 4872, "document_f1", "Crown copyright, open; DUE benchmark"),
    "mmmu": ("MMMU", "validation", 900, "multiple_choice", "Apache-2.0"),
    "mmvet": ("MM-Vet", "test", 218, "mmvet", "Apache-2.0"),
    "pope": ("POPE", "test", 9000, "pope", "MIT"),
    "seed": ("SEED-Bench image", "test", 14232, "multiple_choice", "CC BY-NC 4.0"),
    "tabfact": ("TabFact", "test", 12779, "tabfact", "CC BY 4.0"),
    "tablevqa": ("TableVQA", "test", 1500, "tablevqa", "MIT; parts keep those of their sources"),
    "textvqa": ("TextVQA", "val", 5000, "vqa_accuracy", "CC BY 4.0"),
    "vcr_easy": ("VCR en easy", "test", 5000, "vcr", "CC BY-SA 4.0"),
    "vcr_hard": ("VCR en hard", "test", 5000, "vcr", "CC BY-SA 4.0"),
    "wtq": ("WTQ", "test", 4344, "wtq", "CC BY-SA 4.0"),
}

_SCORES = """
                                docvqa  infovqa  deepform    klc    wtq  tabfact  chartqa  textvqa  tablevqa
Qwen2-VL-2B (base+)              57.23    31.88     49.31  34.39  31.61    64.75    68.60    61.01     47.53
AlignVLM-Llama-3.2-1B            72.42    38.16     60.47  33.71  28.66    71.31    65.44    48.81     50.29
AlignVLM-Llama-3.2-3B            79.63    44.53     63.49  35.25  38.59    78.51    71.88    57.38     60.10
DocOwl1.5-8B (base+)             78.70    47.62     64.39  36.93  35.69    72.65    65.80    67.30     49.03
Llama3.2-11B (base+)             78.99    44.27     67.05  37.22  40.18    78.04    71.40    68.46     56.73
AlignVLM-Llama-3.1-8B            81.18    53.75     63.25  35.50  45.31    83.04    75.00    64.60     64.33
3B, MLP connector                71.46    37.56     62.07  33.36  28.94    73.22    66.48    53.56     50.96
3B, Perceiver Resampler          69.08    34.13     57.08  31.75  27.95    71.93    65.16    51.33     47.76
3B, Ovis                         74.68    42.11     58.02  33.50  33.13    76.67    67.92    52.60     53.93
3B ALIGN, 3.4K embeddings kept   79.40    44.13     63.64  35.02  38.26    78.83    71.72    57.48     59.80

                                docvqa  infovqa  chartqa  textvqa    gqa   mmmu  mmvet   pope   seed
low-data 3B, MLP                 42.11    19.93    48.44    51.97  57.62  33.33  31.14  87.35  58.54
low-data 3B, Perceiver           32.18    18.10    40.00    44.31  55.86  35.22  26.19  84.92  63.70
low-data 3B, Ovis                57.73    26.39    54.52    55.60  56.23  31.89  30.41  88.26  60.97
low-data 3B, H-Reducer           34.59    17.57    45.64    47.13  58.24  35.00  28.39  87.48  61.82
low-data 3B, HoneyBee            55.86    19.36    55.32    58.13  54.79  32.11  34.31  89.28  61.18
low-data 3B, ALIGN               71.43    30.50    69.72    65.63  61.67  35.33  35.32  88.85  63.27

                                vcr_easy  vcr_hard
3B, ALIGN                          65.84     48.07
3B, MLP connector                  51.43     37.89
"""


def _read_scores() -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for table in _SCORES.strip("\n").split("\n\n"):
        header, *rows = table.splitlines()
        names = header.split()
        for row in rows:
            model, *values = row.rsplit(maxsplit=len(names))
            for name, value in zip(names, values, strict=True):
                scores.setdefault(name, {})[model.strip()] = float(value)
    return scores


_PAPER = _read_scores()
"""Benchmark -> model -> score that the paper prints, in per cent."""


def _published(name: str, *, rules: tuple[str, ...] = (), **settings: Any) -> Benchmark:
    """Return a benchmark of the table, with its scores in the paper; predictions have up to 64 tokens."""
    title, split, size, metric, licence = _TABLE[name]
    scorings = (Scoring(metric=metric, rules=rules),)
    common: dict[str, Any] = {"size": size, "licence": licence, "max_new_tokens": 64, "paper": _PAPER[name]}
    return Benchmark(name=name, title=title, split=split, scorings=scorings, **common | settings)


# Human and augmented questions about charts (Masry et al. 2022).
CHARTQA = _published(
    "chartqa",
    sources=(vlmevalkit_table("ChartQA_TEST", "c902e0aa9be5582a7aad6dcf52734b42"),),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing="outer white space trimmed, per cents and numbers by value",
    groups="split",
    notes="one mean over 1,250 human and 1,250 augmented questions",
)

# Five fields of 300 advertising contracts, F1 over all documents (DUE scorer, DocOwl pipeline).
DEEPFORM = _published(
    "deepform",
    sources=(docdownstream("DeepForm"),),
    postprocessing=_FIELDS,
    notes="gold values come from DUE's document.jsonl; 300 documents x 5 fields",
)

# Questions about scanned business documents (Mathew et al. 2021).
DOCVQA = _published(
    "docvqa",
    sources=(vlmevalkit_table("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf"),),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing=_SPACE_AND_CASE,
)

# Compositional questions about photographs (Hudson and Manning 2019).
GQA = _published(
    "gqa",
    sources=(
        vlmevalkit_table(
            "GQA_TestDev_Balanced", "99b62f22e224d9b2f32dcbe41359d1c9", "fead7df22befc1ed3ca2b62ea26fa17b"
        ),
    ),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing="outer white space trimmed, letter case ignored",
)

# Questions about infographics (Mathew et al. 2022).
INFOVQA = _published(
    "infovqa",
    sources=(vlmevalkit_table("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe"),),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing=_SPACE_AND_CASE,
)

# Kleister Charity: eight fields of 609 annual reports, F1 over all documents (DUE scorer, DocOwl pipeline).
KLC = _published(
    "klc",
    sources=(docdownstream("KleisterCharity"),),
    postprocessing=_FIELDS,
    notes="gold values come from DUE's document.jsonl; 609 documents x 8 fields",
)

# College exams with images, multiple-choice or open (Yue et al. 2024).
MMMU = _published(
    "mmmu",
    rules=("vlmevalkit", "vlmevalkit-2025-02", "official"),
    sources=(
        vlmevalkit_table(
            "MMMU_DEV_VAL",
            "585e8ad75e73f75dcad265dfd0417d64",
            "521afc0f3bf341e6654327792781644d",
            contents="1,050 rows, of which the 900 of the validation split are used",
        ),
    ),
    prompt=Prompt(prefix="Question: ", suffix=_LETTER, options=True, place_images=True),
    postprocessing=_OPTION,
    only={"split": "validation"},
    notes=_RULES_ALONE,
)

# Open questions scored by a judge model (Yu et al. 2023).
MMVET = _published(
    "mmvet",
    sources=(vlmevalkit_table("MMVet", "748aa6d4aa9d4de798306a63718455e3"),),
    max_new_tokens=512,
    postprocessing="none: the judge reads the prediction",
    notes="needs a judge; without one there is no score",
)


def _categories(sample: EvalSample) -> int:
    """Return the number of questions that a prediction of POPE counts as: one per category, which are stored once."""
    return len(split_categories(sample)) or 1


# Is an object in the image? Random, popular and adversarial questions (Li et al. 2023).
POPE = _published(
    "pope",
    sources=(
        vlmevalkit_table(
            "POPE",
            "c12f5acb142f2ef1f85a26ba2fbe41d5",
            contents="a row for each distinct question; they count as 9,000",
        ),
    ),
    postprocessing="punctuation left out; the words yes and no are searched",
    count=_categories,
    notes="headline: F1 over all 9,000 questions; a prediction with neither or both words is never right",
)

# SEED-Bench, its image questions: four options each (Li et al. 2023).
SEED = _published(
    "seed",
    sources=(vlmevalkit_table("SEEDBench_IMG", folder="benchmarks/SEEDBench"),),
    prompt=Prompt(prefix="Question: ", suffix=_LETTER, options=True),
    postprocessing=_OPTION,
    notes=_RULES_ALONE,
)

# Is a statement about a Wikipedia table true (Chen et al. 2020)?
TABFACT = _published(
    "tabfact",
    sources=(
        docdownstream("TabFact", contents="the statements whose table has an image; their number is not published"),
    ),
    prompt=Prompt(suffix="\nIs this statement true? Answer with True or False."),
    max_new_tokens=16,
    postprocessing="line ends and outer white space deleted",
    notes="letter case counts; DocDownstream lacks statements whose table has no image",
)

_WTQ = Prompt(
    suffix="\nAnswer with a single word or number. Join several answers with ||.", reference_sha256="a68a688b5950f988"
)

# TableVQA-Bench: questions and statements about images of tables, four parts (Kim et al. 2024).
TABLEVQA = _published(
    "tablevqa",
    sources=(
        SourceFile(
            file="tablevqa-bench.tsv",
            url="https://pai-aigc-photog.oss-cn-hangzhou.aliyuncs.com/mentor-vil/datasets/tablevqa-bench.tsv",
            format="vlmevalkit-tsv",
            md5=("2550adc61bdc82d8e62f3b003de7c62d",),
        ),
    ),
    prompts={
        "vwtq": _WTQ,
        "vwtq_syn": _WTQ,
        "vtabfact": Prompt(suffix="\nIs this statement true or false?", reference_sha256="b5e7a743b3466ac2"),
        "fintabnetqa": Prompt(suffix="\nAnswer in few words and give the unit.", reference_sha256="44830a745df459a7"),
    },
    postprocessing="one leading `Answer: ` is left out; then by part",
    list_answers=False,
    notes="unweighted mean of four parts, the relaxed score of fintabnetqa",
)

# Questions about text in photographs, ten references each (Singh et al. 2019).
TEXTVQA = _published(
    "textvqa",
    sources=(vlmevalkit_table("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd"),),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing="punctuation, articles and number words by VQA's rules",
)


def _vcr(level: str, md5: str) -> Benchmark:
    """VCR-wiki, English: restore text that is covered but for a thin strip (Zhang et al. 2024)."""
    file = f"VCR-wiki-en-{level}-test"
    url = f"https://huggingface.co/datasets/vcr-org/{file}/resolve/main/{file}.tsv"
    return _published(
        f"vcr_{level}",
        sources=(SourceFile(file=f"{file}.tsv", url=url, format="vlmevalkit-tsv", md5=(md5,)),),
        max_new_tokens=120,
        postprocessing="what follows the last `Assistant: `, cut into spaCy's tokens",
        notes="means over all covered texts, not over images; the paper does not name its subset",
    )


VCR_EASY = _vcr("easy", "8a9b96885f251d1c85f42f84073327f1")
VCR_HARD = _vcr("hard", "2d8b8b1ee0eba0e0b618fd3aa7d9710e")

# WikiTableQuestions: questions about Wikipedia tables, scored by denotation (Pasupat and Liang 2015).
WTQ = _published(
    "wtq",
    sources=(docdownstream("WikiTableQuestions", size=4343),),
    prompt=Prompt(suffix=SHORT_ANSWER),
    postprocessing="denotation: dates and numbers by value; accents, quotes, citations and final brackets left out",
    notes="the paper's scores are means over 4,343 questions: DocDownstream lacks one",
)
