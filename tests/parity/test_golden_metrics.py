"""Our metrics against figures that the original scoring scripts gave (not part of the repository)."""

import json
import os
from pathlib import Path

import pytest

from alignvlm_pl.metrics import get_metric

GOLDENS = Path(
    os.environ.get("ALIGNVLM_GOLDENS", Path(__file__).parents[3] / "shared" / "benchmarks" / "golden")
)


@pytest.mark.parametrize("name", ["anls", "relaxed_accuracy"])
def test_every_golden_line(name):
    path = GOLDENS / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}; set ALIGNVLM_GOLDENS to the folder of golden figures")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(cases) > 200
    metric = get_metric(name)
    wrong = [
        (case["prediction"], case["references"], case["score"], score)
        for case in cases
        if abs((score := metric(case["prediction"], case["references"])) - case["score"]) > 1e-9
    ]
    assert not wrong
