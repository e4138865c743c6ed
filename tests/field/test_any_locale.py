"""Files and names beyond ASCII work under a locale that is no UTF-8, for the command and what it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import sys\n"
    "from alignvlm_pl.cli import main\n"
    "status = main()\n"
    "print(open(sys.argv[-1]).read(), sys.getfilesystemencoding(), status)"
)


@pytest.mark.parametrize("variables", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}])
def test_a_command_reads_utf8(tmp_path, variables):
    path = tmp_path / "größe.yaml"
    path.write_text("α", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    environment |= {"PYTHONCOERCECLOCALE": "0", **variables}
    words = [sys.executable, "-c", PROGRAM, "--version", path]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.stdout.decode().splitlines()[-1] == "α utf-8 0", done.stderr
