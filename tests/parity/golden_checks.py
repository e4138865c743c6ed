"""How a line of each golden file is compared with what our metrics give."""

import math

from alignvlm_pl.metrics import METRICS, EvalSample
from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.metrics.document_f1 import DEEPFORM_FIELDS, KLC_FIELDS, annotate, count_fields
from alignvlm_pl.metrics.exact import gqa, relaxed_accuracy, tabfact
from alignvlm_pl.metrics.multiple_choice import mmmu_open, multiple_choice, open_options, possible_values
from alignvlm_pl.metrics.option_letters import chosen_letter
from alignvlm_pl.metrics.pope import yes_no
from alignvlm_pl.metrics.tablevqa import read_amount, tablevqa
from alignvlm_pl.metrics.text import without_final_period, without_newlines
from alignvlm_pl.metrics.vcr import tokenize, vcr
from alignvlm_pl.metrics.vlmevalkit_tables import read_references, reload_predictions
from alignvlm_pl.metrics.vqa_accuracy import vqa_accuracy
from alignvlm_pl.metrics.vqa_words import clean_words, clean_words_m4c
from alignvlm_pl.metrics.wtq import normalise_item, wtq
from alignvlm_pl.scoring.judge import judge_row, judged_score

METRIC_NAMES = {"f1": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall", "Overall": "f1"}
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


# Each check yields (what, expected, found) of one line under one rule; `printed` is what that reference printed.


def check_anls(case, rule, printed):
    yield "score", printed, anls(case["prediction"], case["references"], rule=rule)


def check_relaxed(case, rule, printed):
    yield "score", printed, relaxed_accuracy(case["prediction"], case["references"], rule=rule)
    yield from _scored_texts(case, printed)


def _scored_texts(case, printed):
    if "scored_prediction" in printed:
        yield "prediction", printed["scored_prediction"], without_newlines(case["prediction"])
    if "scored_reference" in printed and case["references"]:
        gold = without_final_period(without_newlines(case["references"][0]))
        yield "reference", printed["scored_reference"], gold


def check_gqa(case, rule, printed):
    yield "score", printed, gqa(case["prediction"], case["references"], rule=rule)


def check_vqa(case, rule, printed):
    def clean(text):
        return clean_words_m4c(text) if rule == "official" else clean_words(text, periods_after_digits=new)

    new = rule == "vlmevalkit"
    yield "score", printed, vqa_accuracy(case["prediction"], case["references"], rule=rule)
    if "normalized_prediction" in printed:
        yield "prediction", printed["normalized_prediction"], clean(case["prediction"])
        yield "references", printed["normalized_references"], [clean(text) for text in case["references"]]


def check_wtq(case, rule, printed):
    canonical = case.get("references_canon")
    yield "score", printed, wtq(case["prediction"], case["references"], rule=rule, canonical=canonical)
    for side in ("prediction", "references"):
        if f"normalized_{side}" in printed:
            yield side, printed[f"normalized_{side}"], [normalise_item(text) for text in case[side]]


def check_tabfact(case, rule, printed):
    yield "score", printed, tabfact(case["prediction"], case["references"], rule=rule)
    yield from _scored_texts(case, printed)


def check_fintabnetqa(case, rule, printed):
    arguments = {"part": "fintabnetqa", "rule": rule}
    yield "score", printed, tablevqa(case["prediction"], case["references"], **arguments)
    if "exact_score" in printed:
        exact = tablevqa(case["prediction"], case["references"], exact=True, **arguments)
        yield "exact", printed["exact_score"], exact
    pair = list(read_amount(case["prediction"].removeprefix("Answer: ")))
    yield "pair", printed.get("normalized_prediction_pair", pair), pair
    yield "prediction", printed.get("normalized_prediction", pair[0]), pair[0]


def check_vtabfact(case, rule, printed):
    found = tablevqa(case["prediction"], case["references"], part="vtabfact", rule=rule)
    yield "score", printed, found
    if "row_score" in printed:  # the toolkit leaves the row empty where the reply has both words
        both = all(word in case["prediction"].lower() for word in ("true", "false"))
        yield "row", printed["row_score"], None if both else found


def check_vwtq(case, rule, printed):
    for part in ("vwtq", "vwtq_syn"):
        yield part, printed, tablevqa(case["prediction"], case["references"], part=part, rule=rule)


def check_tablevqa_corpus(case, rule, printed):
    samples = [row_sample(row, references=(row["answer"],), split=row["split"]) for row in case["rows"]]
    found = METRICS["tablevqa"].evaluate(samples, rule)
    for part, expected in printed["per_split"].items():
        names = [part, f"{part}_exact"][: len(expected)]
        # The toolkit rounds the shares to eight digits before it makes per cents of them.
        yield part, expected, [100 * round(found[name], 8) for name in names]
    parts = printed["per_split"]
    yield "mean", sum(found[part] for part in parts) / len(parts), found["mean"]


def check_vcr(case, rule, printed):
    blanks = vcr(case["prediction"], case["references"], rule=rule)
    yield "score", printed, sum(blank.exact_match for blank in blanks) / max(len(blanks), 1)
    ours = {"best_ngram": "best"} | {name: name for name in ("exact_match", "f1", "jaccard", "similarity")}
    for name, attribute in ours.items():
        if name in printed:
            yield name, printed[name], [getattr(blank, attribute) for blank in blanks]


def check_vcr_corpus(case, rule, printed):
    samples = [row_sample(row, references=read_references(row["answer"])) for row in case["rows"]]
    found = METRICS["vcr"].evaluate(samples, rule)
    yield "score", printed, found["exact_match"]
    yield "jaccard", printed.get("jaccard", found["jaccard"]), found["jaccard"]


def check_vcr_tokens(case, rule, printed):
    yield "tokens", case["tokens"], tokenize(case["text"])


def check_mcq(case, rule, printed):
    choices = case["choices"]
    score = multiple_choice(case["prediction"], [case["answer"]], choices=choices, rule=rule)
    yield "score", printed, score
    if "extracted" not in printed:  # the score alone
        return
    letter = printed["extracted"]
    if rule == "lmms-eval" and letter is not None:  # there it is the first character, whatever it is
        letter = letter.upper() if letter and letter.upper() in choices else "Z"
    yield "letter", letter or "Z", chosen_letter(case["prediction"], choices, rule=rule)


def check_mmmu_open(case, rule, printed):
    yield "score", printed, mmmu_open(case["prediction"], case["references"], rule=rule)
    if "parsed" in printed:
        yield "parsed", printed["parsed"], sorted(map(str, possible_values(case["prediction"])))
    if "options" in printed:
        options = open_options(case["references"])
        yield "options", printed["options"], options
        yield "letter", printed["extracted"], chosen_letter(case["prediction"], options, rule=rule)


def check_yes_no(case, rule, printed):
    found = yes_no(case["prediction"], rule=rule)
    yield "score", printed, float(found == case["answer"])
    yield "extracted", printed.get("extracted", found), found


def check_pope_corpus(case, rule, printed):
    # lmms-eval has a question once for each category: its rows are scored as they stand.
    exploded = rule != "lmms-eval"
    samples = [
        row_sample(row, references=(row["answer"],), category=row["category"] if exploded else "")
        for row in case["rows"]
    ]
    found = METRICS["pope"].evaluate(samples, rule)
    yield "score", printed, 100 * found["f1"]
    for name in ("acc", "precision", "recall"):
        if name in printed:
            yield name, printed[name], 100 * found[METRIC_NAMES[name]]
    yield from categories(printed.get("by_category", {}), found)


def check_mmvet_judge(case, rule, printed):
    asked = []

    def judge(row, temperature):
        asked.append((row, temperature))
        return case["judge_outputs"][len(asked) - 1]

    row = (case["question"], case["answer"], case["prediction"])
    yield "score", printed, judged_score(*row, judge=judge)
    if "judge_calls" in printed:
        temperatures = [0.0, 0.5, 1.0, 1.5, 2.0][: printed["judge_calls"]]
        yield "asked", [[judge_row(*row), temperature] for temperature in temperatures], asked
    last = judge_row(*row).split("\n")[-1]
    yield "row", printed.get("prompt_tail", last), last


def check_mmvet_corpus(case, rule, printed):
    samples = [row_sample(row, category=row["category"], judged=float(row["score"])) for row in case["rows"]]
    found = METRICS["mmvet"].evaluate(samples, rule)
    yield "score", printed, 100 * found["score"]
    for table in ("by_capability", "by_combination"):
        for name, expected in printed.get(table, {}).items():
            yield f"{table} {name}", expected, 100 * found["score" if name == "Overall" else name]


def check_due_f1(case, rule, printed):
    counts = [
        count_fields(document["prediction"], document["reference"], ignore_case=rule == "due")
        for document in case["documents"]
    ]
    yield from document_scores(counts, printed)


def check_ie_pipeline(case, rule, printed):
    fields = {"DeepForm": DEEPFORM_FIELDS, "KLC": KLC_FIELDS}.get(case["dataset"], DEEPFORM_FIELDS + KLC_FIELDS)
    # The pipeline pairs documents by position; so do these lists.
    counts, samples = [], []
    for place, document in enumerate(case["documents"]):
        pairs = [(question["question"], question["prediction"]) for question in document["questions"]]
        counts.append(count_fields(annotate(pairs, fields, rule=rule), document["reference"]))
        meta = {"document": f"{place} {document['name']}", "gold": document["reference"]}
        samples += [
            EvalSample(key=f"{place}", question=question, prediction=text, meta=meta) for question, text in pairs
        ]
    yield from document_scores(counts, printed)
    yield "metric", printed, METRICS["document_f1"].evaluate(samples, rule)["f1"]


def check_qa_pipeline(case, rule, printed):
    scores = []
    for document in case["documents"]:
        gold = {entry["key"]: entry["values"] for entry in document["reference"]}
        for question in sorted(document["questions"], key=lambda question: question["key"]):
            scores.append(question_score(case["dataset"], question["prediction"], gold[question["key"]]))
    yield "score", printed, math.fsum(scores) / len(scores)
    yield "questions", printed.get("per_question_sorted_by_key", scores), scores


def question_score(dataset, prediction, values):
    texts = [value["value"] for value in values]
    if dataset == "WikiTableQuestions":
        return wtq(prediction, texts, rule="docowl")
    if dataset == "TabFact":
        return tabfact(prediction, texts, rule="due")
    variants = [text for value in values for text in value.get("value_variants", [value["value"]])]
    return anls(prediction, variants, rule="docowl-pipeline")


def check_answer_field(case, rule, printed):
    references = read_references(case["answer_field"])
    yield "score", printed, METHODS[case["method"]](case["prediction"], references, rule=rule)
    yield "count", printed.get("n_references", len(references)), len(references)


def check_table_corpus(case, rule, printed):
    rows = case["rows"]
    predictions = reload_predictions([row["prediction"] for row in rows])
    changed = [
        row["index"] for row, text in zip(rows, predictions, strict=True) if text != row["prediction"] or text == "nan"
    ]
    yield "changed", printed.get("rows_changed_by_reload", changed), changed
    metric = METRICS[TABLES[case["dataset"]]]
    samples = [
        EvalSample(key=str(row["index"]), prediction=text, references=read_references(row["answer"]), meta=row)
        for row, text in zip(rows, predictions, strict=True)
    ]
    found = metric.evaluate(samples, rule)
    yield "score", printed, 100 * next(iter(found.values()))
    parts = printed.get("per_split", {})
    if metric.name == "pope":
        yield from categories(parts, found)
        return
    for part, expected in parts.items():
        chosen = [sample for sample in samples if part in ("Overall", sample.meta.get("split"))]
        yield part, expected, 100 * metric.evaluate(chosen, rule)[metric.name]


def row_sample(row, *, references=(), **meta):
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
            yield f"{category} {name}", value, 100 * found[METRIC_NAMES[name] + ending]


def document_scores(counts, printed):
    sums = {name: math.fsum(c.get(name, 0) for c in counts) for name in {name for c in counts for name in c}}
    found = METRICS["document_f1"].scores(sums)
    yield "score", printed, found["f1"]
    for name in ("precision", "recall"):
        if name in printed:
            yield name, printed[name], found[name]
    for name, count in {"true_positives": "correct", "predicted": "predicted", "gold": "gold"}.items():
        if name in printed:
            total = sum(value for key, value in sums.items() if key.startswith(f"{count}/"))
            yield name, printed[name], total
    labels = {name.removeprefix("f1/"): value for name, value in found.items() if name.startswith("f1/")}
    yield "labels", printed.get("per_label", labels), labels


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
