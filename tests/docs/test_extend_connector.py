"""docs/extend/connector.md, followed word by word in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend" / "connector.md"
BOTH = """
import sys
import pytest
failed = pytest.main(["-q", "-p", "no:cacheprovider", "tests/unit", "-k", "average"])
from alignvlm_pl.cli import main
sys.exit(failed or main(sys.argv[1:]))
"""


@pytest.fixture
def copy(tmp_path):
    for name in ("alignvlm_pl", "callbacks", "configs", "datamodules"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "unit" / "test_connector_files.py", tmp_path / "tests" / "unit")
    shutil.copy(ROOT / "cli.py", tmp_path)
    return tmp_path


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_file_one_config_and_one_test_make_a_connector(copy):
    text = PAGE.read_text("utf-8")
    code, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (copy / "alignvlm_pl" / "models" / "connectors" / "average.py").write_text(code, "utf-8")
    (copy / "configs" / "model" / "connector" / "average.yaml").write_text(config)
    (copy / "tests" / "unit" / "test_average.py").write_text(test)
    command = re.search(r"python cli\.py (params .*)", text).group(1).split()
    shown = run(copy, "-c", BOTH, *command)
    assert "6 passed" in shown

    parameters, tokens = re.search(r"prints ([\d,]+) parameters and (\d+) visual tokens a tile", text).groups()
    assert f"connector    {parameters}" in re.sub(r" {2,}", "    ", shown)
    assert f"one tile is {tokens} visual tokens" in shown
