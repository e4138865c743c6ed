"""Our metrics against the scores that the reference implementations printed for the same inputs.

The files hold inputs and outputs only. A compressed copy of them is beside this file; other vectors of the same form
are checked by setting ALIGNVLM_GOLDENS to their folder. REFERENCES says which reference each of our rules reproduces.
"""

import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.parity.golden_checks import CHECKS

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
    "relaxed_accuracy": VK | {"docowl": "docowl", "docowl_pipeline": "docowl-pipeline", "lmms_eval": "lmms-eval"},
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


def read_files():
    if "ALIGNVLM_GOLDENS" in os.environ and not GOLDENS.is_dir():
        raise FileNotFoundError(f"ALIGNVLM_GOLDENS names {GOLDENS}, which is no folder")
    if not GOLDENS.is_dir():
        with tarfile.open(COPY) as archive:
            return {
                Path(member.name).stem: archive.extractfile(member).read().decode() for member in archive.getmembers()
            }
    return {path.stem: path.read_text("utf-8") for path in sorted(GOLDENS.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def files():
    found = read_files()
    assert found, f"no golden files in {GOLDENS}"
    return found


def variants(name, case):
    """Yield (reference, rule, what it printed) of a line."""
    primary = case.get("primary", next(iter(REFERENCES[name])))
    table = {primary: case} | {
        reference: printed if isinstance(printed, dict) else {"score": printed}
        for reference, printed in case.get("by_reference", {}).items()
    }
    for reference, printed in table.items():
        if reference not in NOT_IMPLEMENTED.get(name, ()):
            yield reference, REFERENCES[name].get(reference), printed


def problems(name, case):
    """Yield what is wrong with a line; what it makes us raise is wrong too, and hides no other line."""
    for reference, rule, printed in variants(name, case):
        if rule is None:
            yield f"{reference}: a reference that REFERENCES does not know"
            continue
        try:
            yield from differences(name, case, reference, rule, printed)
        except Exception as error:
            yield f"{reference}: raised {error!r}"


def differences(name, case, reference, rule, printed):
    for what, expected, found in CHECKS[name](case, rule, printed):
        if isinstance(expected, dict) and "score" in expected and expected is printed:
            wrong = not score_agrees(name, case, printed, found)
            expected = printed["score"]
        else:
            wrong = not agrees(expected, found)
        if wrong:
            yield f"{reference} {what}: expected {expected!r}, found {found!r}"


def wrong_lines(name, text):
    """List what is wrong with a file."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found += [f"line {number}: {problem}" for problem in problems(name, json.loads(line))] if line else []
        except Exception as error:  # the line itself is not of the form that the README of the goldens describes
            found.append(f"line {number}: {error!r}")
    return found


def score_agrees(name, case, printed, found):
    # Without any reference there is nothing to be right about. Where the original prints a score, it is ours; where
    # it stops or has the mean of nothing, ours is 0. References of WTQ are no alternatives: two empty lists are equal.
    if case.get("references") == [] and name != "wtq_denotation" and printed["score"] in (None, "NaN"):
        return agrees(0.0, found)
    if printed["score"] is not None:
        return agrees(printed["score"], found)
    if "error" in printed or printed.get("random_fallback"):
        return agrees(INSTEAD[name], found) if name in INSTEAD else 0 <= found <= 1
    return True  # the reference prints no such score


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
    assert not wrong, f"{len(wrong)} scores of {name}.jsonl differ\n{shown}"


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
