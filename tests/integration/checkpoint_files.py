"""Looking into run folders, and what the command line says of them; used by the tests of checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

LAST = "checkpoints/last.ckpt"


def contents(folder: Path) -> dict[str, Any]:
    return torch.load(folder / LAST, weights_only=True)["contents"]


def error_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The error line; no traceback, and short."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert status == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def unfinished_run(trained: Path, folder: Path) -> Path:
    """A copy of the run that has not been exported."""
    shutil.copytree(trained, folder, symlinks=True)
    shutil.rmtree(folder / "hf")
    return folder
