"""docs/extend/benchmark.md, followed word by word in a copy of the project."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend" / "benchmark.md"


@pytest.fixture
def copy(tmp_path):
    for name in ("alignvlm_pl", "callbacks", "datamodules"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cli.py", tmp_path)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_one_file_and_one_test_make_a_benchmark(copy):
    code, test = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (copy / "alignvlm_pl" / "benchmarks" / "invoices.py").write_text(code)
    (copy / "test_invoices.py").write_text(test)
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_invoices.py")
    assert done.returncode == 0, done.stdout

    rows = [{"key": key, "prediction": "x", "references": ["x"]} for key in "abc"]
    (copy / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = re.search(r"python (cli\.py score .*)", PAGE.read_text("utf-8")).group(1).split()
    done = run(copy, *command, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert (scores["num"], scores["complete"], scores["anls"]) == (3, True, 1.0)
