"""Tables and claims of a report, from results whose differences are known."""

import numpy as np
import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.study.compare import compare
from alignvlm_pl.study.plan import Cell, Study
from alignvlm_pl.study.report import design, write_report
from alignvlm_pl.study.results import Results


@pytest.fixture
def study(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{}]\n")
    arms = {name: {"connector.type": name} for name in ("align", "mlp", "ovis", "perceiver")}
    return Study(
        path=tmp_path / "some.yaml", recipe=recipe, arms=arms, base="align", seeds=[0, 1, 2], budgets=["samples"]
    )


def write(study, results, *, arm, seed, right, datasets=("a", "b", "c")):
    """A result whose share of right answers is given, on 200 documents of one question."""
    rng = np.random.default_rng([seed, len(arm)])
    own = [float(rng.random() < right) for _ in range(200)]
    columns = {"keys": [str(i) for i in range(200)], "documents": [str(i) for i in range(200)], "exact_match": own}
    cell = Cell(study=study, arm=arm, seed=seed, budget="samples")
    spent = {"steps": [7, 3], "samples": 80, "seconds": 90.0, "flops": 2e12, "loss": {}, "order": {"1": "x"}}
    results.write(
        cell, {**spent, "questions": dict.fromkeys(datasets, columns), "made": {"commit": "c"}, "measures": {}}
    )


def test_claims_hold_do_not_hold_or_are_left_open(study, tmp_path):
    results = Results(tmp_path / "results")
    for arm, right in (("align", 0.6), ("mlp", 0.3), ("ovis", 0.9), ("perceiver", 0.58)):
        for seed in study.seeds:
            write(study, results, arm=arm, seed=seed, right=right)
    (markdown, page) = write_report(study, ["connectors"], results, tmp_path / "report", command="the command")
    text = markdown.read_text("utf-8")
    claims = [line for line in text.splitlines() if "scores above" in line and "a, exact_match" in line]
    verdicts = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in claims}
    assert verdicts["ALIGN scores above the MLP"] == "holds"
    assert verdicts["ALIGN scores above Ovis"] == "does not hold"
    assert verdicts["ALIGN scores above the Perceiver Resampler"] == "cannot be told at this size"
    assert "| align | 10 | 80 | 2 | 1.5 | none |" in text
    assert "| mlp | 53.06 | 40.61 | 53.59 |" in text, "the paper's"
    assert "![exact_match, radar](connectors-samples-exact_match-radar.svg)" in text
    assert "<table>" in page.read_text("utf-8")
    assert (tmp_path / "report" / "connectors-samples-exact_match.svg").stat().st_size > 1000


def test_differences_are_of_the_seeds_that_both_have_and_p_values_of_all_datasets(study, tmp_path):
    results = Results(tmp_path / "results")
    for arm, right, seeds in (("align", 0.6, (0, 1, 2)), ("mlp", 0.45, (1, 2))):
        for seed in seeds:
            write(study, results, arm=arm, seed=seed, right=right)
    align, mlp, ovis, _ = compare(study, "samples", results)
    assert (align.missing, mlp.missing, ovis.missing) == ([], [0], [0, 1, 2])
    assert not align.differences and not ovis.scores
    one = mlp.differences["a", "exact_match"]
    assert one.seeds == 2
    expected = [
        np.mean(
            [
                results.read(Cell(study=study, arm=arm, seed=s, budget="samples"))["questions"]["a"]["exact_match"]
                for s in (1, 2)
            ]
        )
        for arm in ("mlp", "align")
    ]
    assert one.mean == pytest.approx(expected[0] - expected[1])
    assert mlp.adjusted["a", "exact_match"] == pytest.approx(min(1, 3 * one.p_value)), "three datasets, all alike"


def test_the_design_says_what_it_can_find(study):
    assert "200 documents, 3 seeds: a true difference of 0." in design(study, documents=200)
    single = Study(**{**{name: getattr(study, name) for name in Study.__dataclass_fields__}, "seeds": [0]})
    assert "one seed: intervals hold for it alone" in design(single, documents=200)


def test_a_missing_package_is_named(study, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "markdown", None)
    with pytest.raises(ConfigError, match=r"study needs the package markdown: pip install 'alignvlm_pl\[study\]'"):
        write_report(study, ["connectors"], Results(tmp_path), tmp_path / "report", command="")
