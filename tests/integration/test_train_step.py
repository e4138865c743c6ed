"""perf/train_step.py runs what it is meant to run, on a CPU and a tiny shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fit_and_bare_loop_are_timed(tmp_path):
    command = [
        sys.executable,
        "perf/train_step.py",
        "--json",
        "--device=cpu",
        "--model=small",
        "--tiles",
        "1",
        "2",
    ]
    command += ["--strategies", "auto", "ddp", "--steps=2", "--rounds=1", "--batch_size=1", "--text=8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: the target is missed, as one short round may
    found = json.loads(done.stdout.splitlines()[-1])
    for case in ("1_tiles_auto", "1_tiles_ddp", "2_tiles_auto", "2_tiles_ddp"):
        assert found[f"{case}_mfu"] > 0
        assert found[f"{case}_memory_gib"] > 0.1
        shares = [found[f"{case}_{part}_work_share"] for part in ("vision", "connector", "llm", "head")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        # Of one sample: 16 visual tokens a tile, and a text of some 40.
        per_tile = found[f"{case}_fit_tokens_per_s"] / found[f"{case}_fit_tiles_per_s"]
        assert 16 < per_tile < 16 + 80
    assert found["2_tiles_auto_vision_work_share"] > found["1_tiles_auto_vision_work_share"]
    assert found["fit_over_bare"] == min(found["1_tiles_auto_fit_over_bare"], found["2_tiles_auto_fit_over_bare"])
    assert "1_tiles_ddp_fit_over_bare" not in found, "the bare loop must not run on modules that DDP has wrapped"
