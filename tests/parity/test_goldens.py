"""Our metrics against figures that the reference implementations printed for the same inputs.

The files hold inputs and outputs only. A compressed copy of them is beside this file; other vectors of the same form
are checked by setting ALIGNVLM_GOLDENS to their folder. REFERENCES says which reference each of our rules reproduces.
"""

import json
import math
import os
import tarfile
from pathlib import Path

import pytest

from alignvlm_pl.metrics import (
    METRICS,
    Answer,
    anls,
    annotate,
    chosen_letter,
    count_fields,
    gqa,
    judged_score,
    mmmu_open,
    multiple_choice,
    read_references,
    relaxed_accuracy,
    reload_predictions,
    tabfact,
    tablevqa,
    vcr,
    vqa_accuracy,
    wtq,
    yes_no,
)
from alignvlm_pl.metrics.document_f1 import DEEPFORM_FIELDS, KLC_FIELDS
from alignvlm_pl.metrics.mmmu_open import open_options, possible_answers
from alignvlm_pl.metrics.mmvet import judge_row
from alignvlm_pl.metrics.tablevqa import read_amount
from alignvlm_pl.metrics.text import without_final_period, without_newlines
from alignvlm_pl.metrics.vcr import tokenize
from alignvlm_pl.metrics.vqa_words import clean_words, clean_words_m4c
from alignvlm_pl.metrics.wtq import normalize

DEFAULT = Path(__file__).parents[3] / "shared" / "benchmarks" / "golden"
GOLDENS = Path(os.environ.get("ALIGNVLM_GOLDENS", DEFAULT))
COPY = Path(__file__).with_name("goldens.tar.xz")
TOLERANCE = 1e-9
PRINTED = 20

VK = {"vlmevalkit": "vlmevalkit", "vlmevalkit_2025_02": "vlmevalkit-2025-02"}
DOCOWL = {"docowl_pipeline": "docowl"}

# Golden file -> name of a reference in it -> our rule. What each file's primary reference is stands in its lines.
REFERENCES = {
    "anls": VK
    | {
        "docowl": "docowl",
        "due": "due",
        "due_case_sensitive": "due-case-sensitive",
        "lmms_eval": "lmms-eval",
        "mmf_stvqa": "st-vqa",
    },
    "docowl_ie_pipeline_corpus": DOCOWL,
    "docowl_qa_pipeline_corpus": DOCOWL,
    "due_f1_corpus": {"due": "due", "due_case_sensitive": "due-case-sensitive"},
    "gqa": VK | {"lmms_eval": "lmms-eval"},
    "mcq": VK | {"lmms_eval_seedbench": "lmms-eval", "mmmu_official": "official"},
    "mmmu_open": VK | {"mmmu_official": "official"},
    "mmvet_corpus": VK,
    "mmvet_judge": VK,
    "pope_corpus": VK | {"lmms_eval": "lmms-eval"},
    "relaxed_accuracy": VK
    | {"docowl": "docowl", "docowl_pipeline": "docowl-pipeline", "lmms_eval": "lmms-eval"},
    "tabfact_exact": DOCOWL,
    "tablevqa_fintabnetqa": VK | {"tablevqabench_original": "official"},
    "tablevqa_vtabfact": VK | {"tablevqabench_original": "official"},
    "tablevqa_vwtq": VK | {"tablevqabench_original": "official"},
    "tablevqabench_corpus": VK,
    "vcr": VK | {"lmms_eval": "lmms-eval", "vcr_original": "official"},
    "vcr_corpus": VK,
    "vcr_tokens": {"vlmevalkit": "vlmevalkit"},
    "vlmevalkit_answer_field": VK,
    "vlmevalkit_table_corpus": VK,
    "vqa_accuracy": VK | {"lmms_eval": "lmms-eval", "mmf_m4c": "official"},
    "wtq_denotation": {
        "due": "due",
        "wtq_official": "official",
        "wtq_official_with_canonical": "official-canonical",
        "vlmevalkit": "vlmevalkit",
    },
    "yes_no": VK,
}
# References in the files that no rule of ours claims to reproduce, by file: there is none.
NOT_IMPLEMENTED: dict[str, set[str]] = {}

# What we return where a reference stops with an error or draws lots; files without an entry: any score from 0 to 1
# (the number of references is not the one it wants, or they are no texts).
INSTEAD = {"anls": 1.0, "mcq": 0.0, "tablevqa_vwtq": 0.0}

FIGURES = {"f1": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall", "Overall": "f1"}
TABLES = {
    "ChartQA_TEST": "relaxed_accuracy",
    "DocVQA_VAL": "anls",
    "GQA_TestDev_Balanced": "gqa",
    "InfoVQA_VAL": "anls",
    "POPE": "pope",
    "TextVQA_VAL": "vqa_accuracy",
}
METHODS = {
    "accuracy": gqa,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_score": vqa_accuracy,
}


# Each check yields (what, expected, found) of one line under one rule; `figures` are those of that reference.


def check_anls(case, rule, figures):
    yield "score", figures, anls(case["prediction"], case["references"], rule=rule)


def check_relaxed(case, rule, figures):
    yield "score", figures, relaxed_accuracy(case["prediction"], case["references"], rule=rule)
    if "scored_prediction" in figures:
        yield "prediction", figures["scored_prediction"], without_newlines(case["prediction"])
    if "scored_reference" in figures and case["references"]:
        gold = without_final_period(without_newlines(case["references"][0]))
        yield "reference", figures["scored_reference"], gold


def check_gqa(case, rule, figures):
    yield "score", figures, gqa(case["prediction"], case["references"], rule=rule)


def check_vqa(case, rule, figures):
    def clean(text):
        return clean_words_m4c(text) if rule == "official" else clean_words(text, periods_after_digits=new)

    new = rule == "vlmevalkit"
    yield "score", figures, vqa_accuracy(case["prediction"], case["references"], rule=rule)
    if "normalized_prediction" in figures:
        yield "prediction", figures["normalized_prediction"], clean(case["prediction"])
        yield "references", figures["normalized_references"], [clean(text) for text in case["references"]]


def check_wtq(case, rule, figures):
    canonical = case.get("references_canon")
    yield "score", figures, wtq(case["prediction"], case["references"], rule=rule, canonical=canonical)
    for side in ("prediction", "references"):
        if f"normalized_{side}" in figures:
            yield side, figures[f"normalized_{side}"], [normalize(text) for text in case[side]]


def check_tabfact(case, rule, figures):
    yield "score", figures, tabfact(case["prediction"], case["references"], rule=rule)
    if "scored_prediction" in figures:
        yield "prediction", figures["scored_prediction"], without_newlines(case["prediction"])
    if "scored_reference" in figures and case["references"]:
        gold = without_final_period(without_newlines(case["references"][0]))
        yield "reference", figures["scored_reference"], gold


def check_fintabnetqa(case, rule, figures):
    arguments = {"part": "fintabnetqa", "rule": rule}
    yield "score", figures, tablevqa(case["prediction"], case["references"], **arguments)
    if "exact_score" in figures:
        exact = tablevqa(case["prediction"], case["references"], exact=True, **arguments)
        yield "exact", figures["exact_score"], exact
    pair = list(read_amount(case["prediction"].removeprefix("Answer: ")))
    yield "pair", figures.get("normalized_prediction_pair", pair), pair
    yield "prediction", figures.get("normalized_prediction", pair[0]), pair[0]


def check_vtabfact(case, rule, figures):
    found = tablevqa(case["prediction"], case["references"], part="vtabfact", rule=rule)
    yield "score", figures, found
    if "row_score" in figures:  # the toolkit leaves the row empty where the reply has both words
        both = all(word in case["prediction"].lower() for word in ("true", "false"))
        yield "row", figures["row_score"], None if both else found


def check_vwtq(case, rule, figures):
    for part in ("vwtq", "vwtq_syn"):
        yield part, figures, tablevqa(case["prediction"], case["references"], part=part, rule=rule)


def check_tablevqa_corpus(case, rule, figures):
    answers = [row_answer(row, references=(row["answer"],), split=row["split"]) for row in case["rows"]]
    found = METRICS["tablevqa"].evaluate(answers, rule)
    for part, expected in figures["per_split"].items():
        names = [part, f"{part}_exact"][: len(expected)]
        # The toolkit rounds the shares to eight digits before it makes per cents of them.
        yield part, expected, [100 * round(found[name], 8) for name in names]
    parts = figures["per_split"]
    yield "mean", sum(found[part] for part in parts) / len(parts), found["mean"]


def check_vcr(case, rule, figures):
    blanks = vcr(case["prediction"], case["references"], rule=rule)
    yield "score", figures, sum(blank.exact_match for blank in blanks) / max(len(blanks), 1)
    ours = {"best_ngram": "best"} | {name: name for name in ("exact_match", "f1", "jaccard", "similarity")}
    for name, attribute in ours.items():
        if name in figures:
            yield name, figures[name], [getattr(blank, attribute) for blank in blanks]


def check_vcr_corpus(case, rule, figures):
    answers = [row_answer(row, references=read_references(row["answer"])) for row in case["rows"]]
    found = METRICS["vcr"].evaluate(answers, rule)
    yield "score", figures, found["exact_match"]
    yield "jaccard", figures.get("jaccard", found["jaccard"]), found["jaccard"]


def check_vcr_tokens(case, rule, figures):
    yield "tokens", case["tokens"], tokenize(case["text"])


def check_mcq(case, rule, figures):
    choices = case["choices"]
    score = multiple_choice(case["prediction"], [case["answer"]], choices=choices, rule=rule)
    yield "score", figures, score
    if "extracted" not in figures:  # the score alone
        return
    letter = figures["extracted"]
    if rule == "lmms-eval" and letter is not None:  # there it is the first character, whatever it is
        letter = letter.upper() if letter and letter.upper() in choices else "Z"
    yield "letter", letter or "Z", chosen_letter(case["prediction"], choices, rule=rule)


def check_mmmu_open(case, rule, figures):
    yield "score", figures, mmmu_open(case["prediction"], case["references"], rule=rule)
    if "parsed" in figures:
        yield "parsed", figures["parsed"], sorted(map(str, possible_answers(case["prediction"])))
    if "options" in figures:
        options = open_options(case["references"])
        yield "options", figures["options"], options
        yield "letter", figures["extracted"], chosen_letter(case["prediction"], options, rule=rule)


def check_yes_no(case, rule, figures):
    found = yes_no(case["prediction"], rule=rule)
    yield "score", figures, float(found == case["answer"])
    yield "extracted", figures.get("extracted", found), found


def check_pope_corpus(case, rule, figures):
    # lmms-eval has a question once for each category: its rows are scored as they stand.
    exploded = rule != "lmms-eval"
    answers = [
        row_answer(row, references=(row["answer"],), category=row["category"] if exploded else "")
        for row in case["rows"]
    ]
    found = METRICS["pope"].evaluate(answers, rule)
    yield "score", figures, 100 * found["f1"]
    for name in ("acc", "precision", "recall"):
        if name in figures:
            yield name, figures[name], 100 * found[FIGURES[name]]
    yield from categories(figures.get("by_category", {}), found)


def check_mmvet_judge(case, rule, figures):
    asked = []

    def judge(row, temperature):
        asked.append((row, temperature))
        return case["judge_outputs"][len(asked) - 1]

    row = (case["question"], case["answer"], case["prediction"])
    yield "score", figures, judged_score(*row, judge=judge)
    if "judge_calls" in figures:
        temperatures = [0.0, 0.5, 1.0, 1.5, 2.0][: figures["judge_calls"]]
        yield "asked", [[judge_row(*row), temperature] for temperature in temperatures], asked
    last = judge_row(*row).split("\n")[-1]
    yield "row", figures.get("prompt_tail", last), last


def check_mmvet_corpus(case, rule, figures):
    answers = [row_answer(row, category=row["category"], judged=float(row["score"])) for row in case["rows"]]
    found = METRICS["mmvet"].evaluate(answers, rule)
    yield "score", figures, 100 * found["score"]
    for table in ("by_capability", "by_combination"):
        for name, expected in figures.get(table, {}).items():
            yield f"{table} {name}", expected, 100 * found["score" if name == "Overall" else name]


def check_due_f1(case, rule, figures):
    counts = [
        count_fields(document["prediction"], document["reference"], ignore_case=rule == "due")
        for document in case["documents"]
    ]
    yield from document_figures(counts, figures)


def check_ie_pipeline(case, rule, figures):
    fields = {"DeepForm": DEEPFORM_FIELDS, "KLC": KLC_FIELDS}.get(
        case["dataset"], DEEPFORM_FIELDS + KLC_FIELDS
    )
    # The pipeline pairs documents by position; so do these lists.
    counts, answers = [], []
    for place, document in enumerate(case["documents"]):
        pairs = [(question["question"], question["prediction"]) for question in document["questions"]]
        counts.append(count_fields(annotate(pairs, fields, rule=rule), document["reference"]))
        meta = {"document": f"{place} {document['name']}", "gold": document["reference"]}
        answers += [
            Answer(key=f"{place}", question=question, prediction=text, meta=meta) for question, text in pairs
        ]
    yield from document_figures(counts, figures)
    yield "metric", figures, METRICS["document_f1"].evaluate(answers, rule)["f1"]


def check_qa_pipeline(case, rule, figures):
    scores = []
    for document in case["documents"]:
        gold = {entry["key"]: entry["values"] for entry in document["reference"]}
        for question in sorted(document["questions"], key=lambda question: question["key"]):
            scores.append(question_score(case["dataset"], question["prediction"], gold[question["key"]]))
    yield "score", figures, math.fsum(scores) / len(scores)
    yield "questions", figures.get("per_question_sorted_by_key", scores), scores


def question_score(dataset, prediction, values):
    texts = [value["value"] for value in values]
    if dataset == "WikiTableQuestions":
        return wtq(prediction, texts, rule="docowl")
    if dataset == "TabFact":
        return tabfact(prediction, texts, rule="due")
    variants = [text for value in values for text in value.get("value_variants", [value["value"]])]
    return anls(prediction, variants, rule="docowl-pipeline")


def check_answer_field(case, rule, figures):
    references = read_references(case["answer_field"])
    yield "score", figures, METHODS[case["method"]](case["prediction"], references, rule=rule)
    yield "count", figures.get("n_references", len(references)), len(references)


def check_table_corpus(case, rule, figures):
    rows = case["rows"]
    predictions = reload_predictions([row["prediction"] for row in rows])
    changed = [
        row["index"]
        for row, text in zip(rows, predictions, strict=True)
        if text != row["prediction"] or text == "nan"
    ]
    yield "changed", figures.get("rows_changed_by_reload", changed), changed
    metric = METRICS[TABLES[case["dataset"]]]
    answers = [
        Answer(key=str(row["index"]), prediction=text, references=read_references(row["answer"]), meta=row)
        for row, text in zip(rows, predictions, strict=True)
    ]
    found = metric.evaluate(answers, rule)
    yield "score", figures, 100 * next(iter(found.values()))
    parts = figures.get("per_split", {})
    if metric.name == "pope":
        yield from categories(parts, found)
        return
    for part, expected in parts.items():
        chosen = [answer for answer in answers if part in ("Overall", answer.meta.get("split"))]
        yield part, expected, 100 * metric.evaluate(chosen, rule)[metric.name]


def row_answer(row, *, references=(), **meta):
    return Answer(
        key=str(row.get("index", "")),
        prediction=row.get("prediction", ""),
        references=tuple(references),
        meta=meta,
    )


def categories(expected, found):
    for category, values in expected.items():
        ending = "" if category == "Overall" else f"/{category}"
        for name, value in values.items():
            yield f"{category} {name}", value, 100 * found[FIGURES[name] + ending]


def document_figures(counts, figures):
    sums = {name: math.fsum(c.get(name, 0) for c in counts) for name in {name for c in counts for name in c}}
    found = METRICS["document_f1"].figures(sums)
    yield "score", figures, found["f1"]
    for name in ("precision", "recall"):
        if name in figures:
            yield name, figures[name], found[name]
    for name, count in {"true_positives": "correct", "predicted": "predicted", "gold": "gold"}.items():
        if name in figures:
            total = sum(value for key, value in sums.items() if key.startswith(f"{count}/"))
            yield name, figures[name], total
    labels = {name.removeprefix("f1/"): value for name, value in found.items() if name.startswith("f1/")}
    yield "labels", figures.get("per_label", labels), labels


CHECKS = {
    "anls": check_anls,
    "docowl_ie_pipeline_corpus": check_ie_pipeline,
    "docowl_qa_pipeline_corpus": check_qa_pipeline,
    "due_f1_corpus": check_due_f1,
    "gqa": check_gqa,
    "mcq": check_mcq,
    "mmmu_open": check_mmmu_open,
    "mmvet_corpus": check_mmvet_corpus,
    "mmvet_judge": check_mmvet_judge,
    "pope_corpus": check_pope_corpus,
    "relaxed_accuracy": check_relaxed,
    "tabfact_exact": check_tabfact,
    "tablevqa_fintabnetqa": check_fintabnetqa,
    "tablevqa_vtabfact": check_vtabfact,
    "tablevqa_vwtq": check_vwtq,
    "tablevqabench_corpus": check_tablevqa_corpus,
    "vcr": check_vcr,
    "vcr_corpus": check_vcr_corpus,
    "vcr_tokens": check_vcr_tokens,
    "vlmevalkit_answer_field": check_answer_field,
    "vlmevalkit_table_corpus": check_table_corpus,
    "vqa_accuracy": check_vqa,
    "wtq_denotation": check_wtq,
    "yes_no": check_yes_no,
}


def read_files():
    if "ALIGNVLM_GOLDENS" in os.environ and not GOLDENS.is_dir():
        raise FileNotFoundError(f"ALIGNVLM_GOLDENS names {GOLDENS}, which is no folder")
    if not GOLDENS.is_dir():
        with tarfile.open(COPY) as archive:
            return {
                Path(member.name).stem: archive.extractfile(member).read().decode()
                for member in archive.getmembers()
            }
    return {path.stem: path.read_text("utf-8") for path in sorted(GOLDENS.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def files():
    found = read_files()
    assert found, f"no golden files in {GOLDENS}"
    return found


def variants(name, case):
    """Yield (reference, rule, its figures) of a line."""
    primary = case.get("primary", next(iter(REFERENCES[name])))
    table = {primary: case} | {
        reference: figures if isinstance(figures, dict) else {"score": figures}
        for reference, figures in case.get("by_reference", {}).items()
    }
    for reference, figures in table.items():
        if reference not in NOT_IMPLEMENTED.get(name, ()):
            yield reference, REFERENCES[name].get(reference), figures


def problems(name, case):
    """Yield what is wrong with a line; what it makes us raise is wrong too, and hides no other line."""
    for reference, rule, figures in variants(name, case):
        if rule is None:
            yield f"{reference}: a reference that REFERENCES does not know"
            continue
        try:
            yield from differences(name, case, reference, rule, figures)
        except Exception as error:
            yield f"{reference}: raised {error!r}"


def differences(name, case, reference, rule, figures):
    for what, expected, found in CHECKS[name](case, rule, figures):
        if isinstance(expected, dict) and "score" in expected and expected is figures:
            wrong = not score_agrees(name, case, figures, found)
            expected = figures["score"]
        else:
            wrong = not agrees(expected, found)
        if wrong:
            yield f"{reference} {what}: expected {expected!r}, found {found!r}"


def wrong_lines(name, text):
    """List what is wrong with a file."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found += (
                [f"line {number}: {problem}" for problem in problems(name, json.loads(line))] if line else []
            )
        except (
            Exception
        ) as error:  # the line itself is not of the form that the README of the goldens describes
            found.append(f"line {number}: {error!r}")
    return found


def score_agrees(name, case, figures, found):
    # Without any reference there is nothing to be right about. Where the original prints a figure, it is ours; where
    # it stops or has the mean of nothing, ours is 0. References of WTQ are no alternatives: two empty lists are equal.
    if case.get("references") == [] and name != "wtq_denotation" and figures["score"] in (None, "NaN"):
        return agrees(0.0, found)
    if figures["score"] is not None:
        return agrees(figures["score"], found)
    if "error" in figures or figures.get("random_fallback"):
        return agrees(INSTEAD[name], found) if name in INSTEAD else 0 <= found <= 1
    return True  # the reference prints no such figure


def agrees(expected, found):
    if isinstance(expected, dict):
        return set(expected) == set(found) and all(agrees(expected[key], found[key]) for key in expected)
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(agrees, expected, found))
    if isinstance(found, float | int):
        if expected in ("NaN", "Infinity", "-Infinity"):
            expected = float(expected)
        if not isinstance(expected, float | int):
            return False
        return str(float(expected)) == str(float(found)) or abs(expected - found) <= TOLERANCE
    return expected == found


@pytest.mark.parametrize("name", CHECKS)
def test_every_golden_line(name, files):
    if name not in files:
        pytest.skip(f"no {name}.jsonl in {GOLDENS}")
    wrong = wrong_lines(name, files[name])
    shown = "\n".join(text[:500] for text in wrong[:PRINTED])
    assert files[name].strip()
    assert not wrong, f"{len(wrong)} figures of {name}.jsonl differ\n{shown}"


MCQ = {
    "prediction": "B",
    "choices": {"A": "x", "B": "y"},
    "answer": "B",
    "score": 1.0,
    "primary": "vlmevalkit",
}


def test_a_variant_may_be_its_score_alone():
    bare = {**MCQ, "by_reference": {"vlmevalkit_2025_02": 1.0, "lmms_eval_seedbench": {"score": 1.0}}}
    assert wrong_lines("mcq", json.dumps(bare)) == []
    assert wrong_lines("mcq", json.dumps({**MCQ, "extracted": "B"})) == []
    (wrong,) = wrong_lines("mcq", json.dumps({**MCQ, "extracted": None}))
    assert wrong == "line 1: vlmevalkit letter: expected 'Z', found 'B'"


def test_a_line_that_raises_hides_no_other():
    lines = [{**MCQ, "score": 0.0}, {**MCQ, "choices": 5}, {"score": 1.0}, {**MCQ, "prediction": "A"}]
    found = wrong_lines("mcq", "\n".join(["{", *map(json.dumps, lines)]) + "\n")
    assert [line.split(":")[0] for line in found] == [f"line {number}" for number in range(1, 6)]
    assert "raised TypeError" in found[2]


@pytest.mark.parametrize("score", [None, "NaN", 0.0, 0])
@pytest.mark.parametrize("name", ["anls", "gqa", "relaxed_accuracy", "tabfact_exact", "vcr", "vqa_accuracy"])
def test_without_references_nothing_is_right(name, score):
    case = {"prediction": "a", "references": [], "score": score, "primary": next(iter(REFERENCES[name]))}
    case |= {"error": "ValueError"} if score is None else {}
    assert wrong_lines(name, json.dumps(case)) == []
    assert len(wrong_lines(name, json.dumps({**case, "score": 1.0}))) == 1


def test_every_golden_file_is_known(files):
    assert sorted(set(files) - set(CHECKS)) == []
    assert list(CHECKS) == list(REFERENCES)


def test_the_copy_is_small_and_whole():
    assert COPY.stat().st_size <= 1_000_000
    with tarfile.open(COPY) as archive:
        assert {Path(name).stem for name in archive.getnames()} == set(CHECKS)
