"""How a line of each golden file is compared with what our metrics give."""

import math

from alignvlm_pl.metrics import METRICS, EvalSample
from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.metrics.document_f1 import DEEPFORM_FIELDS, KLC_FIELDS, annotate, count_fields
from alignvlm_pl.metrics.gqa import gqa
from alignvlm_pl.metrics.mmmu_open import mmmu_open, open_options, possible_answers
from alignvlm_pl.metrics.mmvet import judge_row, judged_score
from alignvlm_pl.metrics.multiple_choice import multiple_choice
from alignvlm_pl.metrics.option_letters import chosen_letter
from alignvlm_pl.metrics.pope import yes_no
from alignvlm_pl.metrics.relaxed import relaxed_accuracy
from alignvlm_pl.metrics.tabfact import tabfact
from alignvlm_pl.metrics.tablevqa import read_amount, tablevqa
from alignvlm_pl.metrics.text import without_final_period, without_newlines
from alignvlm_pl.metrics.vcr import tokenize, vcr
from alignvlm_pl.metrics.vlmevalkit_tables import read_references, reload_predictions
from alignvlm_pl.metrics.vqa_accuracy import vqa_accuracy
from alignvlm_pl.metrics.vqa_words import clean_words, clean_words_m4c
from alignvlm_pl.metrics.wtq import normalise_item, wtq

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
    yield from _scored_texts(case, figures)


def _scored_texts(case, figures):
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
            yield side, figures[f"normalized_{side}"], [normalise_item(text) for text in case[side]]


def check_tabfact(case, rule, figures):
    yield "score", figures, tabfact(case["prediction"], case["references"], rule=rule)
    yield from _scored_texts(case, figures)


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
    fields = {"DeepForm": DEEPFORM_FIELDS, "KLC": KLC_FIELDS}.get(case["dataset"], DEEPFORM_FIELDS + KLC_FIELDS)
    # The pipeline pairs documents by position; so do these lists.
    counts, answers = [], []
    for place, document in enumerate(case["documents"]):
        pairs = [(question["question"], question["prediction"]) for question in document["questions"]]
        counts.append(count_fields(annotate(pairs, fields, rule=rule), document["reference"]))
        meta = {"document": f"{place} {document['name']}", "gold": document["reference"]}
        answers += [
            EvalSample(key=f"{place}", question=question, prediction=text, meta=meta) for question, text in pairs
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
        row["index"] for row, text in zip(rows, predictions, strict=True) if text != row["prediction"] or text == "nan"
    ]
    yield "changed", figures.get("rows_changed_by_reload", changed), changed
    metric = METRICS[TABLES[case["dataset"]]]
    answers = [
        EvalSample(key=str(row["index"]), prediction=text, references=read_references(row["answer"]), meta=row)
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
    return EvalSample(
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
    found = METRICS["document_f1"].scores(sums)
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
