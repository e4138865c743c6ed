"""perf/train_step.py runs what it is meant to run, on a CPU and a tiny shape."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.drills.launch import run_command

ROOT = Path(__file__).parents[2]


def forked(command: list[str], *, env: dict[str, str], **options: Any) -> CompletedProcess[str]:
    """As `subprocess.run` on a program that is the command line, without its imports."""
    done = run_command(command[3:], environment=env)
    return CompletedProcess(command, done.returncode, "", done.output)


def measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What the script prints, of one step a round."""
    monkeypatch.syspath_prepend(ROOT / "perf")
    import train_step

    monkeypatch.setattr(train_step.subprocess, "run", forked)
    sizes = ["--device=cpu", "--model=small", "--batch_size=1", "--text=8", "--steps=1", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--json", *sizes, *options])
    assert train_step.main() in (0, 1)  # 1: the target is missed, as one short round may
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_fit_and_bare_loop_are_timed(monkeypatch, capsys):
    found = measured(monkeypatch, capsys, "--tiles", "1", "--strategies", "auto")
    found |= measured(monkeypatch, capsys, "--tiles", "2", "--strategies", "ddp")
    for case in ("1_tiles_auto", "2_tiles_ddp"):
        assert found[f"{case}_mfu"] > 0
        assert found[f"{case}_memory_gib"] > 0.1
        shares = [found[f"{case}_{part}_work_share"] for part in ("vision", "connector", "llm", "head")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        # Of one sample: 16 visual tokens a tile, and a text of some 40.
        per_tile = found[f"{case}_fit_tokens_per_s"] / found[f"{case}_fit_tiles_per_s"]
        assert 16 < per_tile < 16 + 80
    assert found["2_tiles_ddp_vision_work_share"] > found["1_tiles_auto_vision_work_share"]
    assert found["fit_over_bare"] == found["1_tiles_auto_fit_over_bare"] > 0
    assert "2_tiles_ddp_fit_over_bare" not in found, "the bare loop must not run on modules that DDP has wrapped"
