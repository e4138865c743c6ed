"""perf/train_step.py runs what it is meant to run, on a CPU and a tiny shape."""

import importlib
import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from alignvlm_pl.cli.lightning_cli import check_trainer
from alignvlm_pl.errors import ConfigError
from tests.drills.launch import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "perf")
    return importlib.import_module("train_step")


class Settings(dict):
    """Settings of a trainer; those not given are None."""

    __getattr__ = dict.get

    def __missing__(self, name):
        return None


def test_the_strategies_of_a_gpu_are_ones_that_fit_takes(train_step):
    for strategy in train_step.CUDA_STRATEGIES:
        if strategy.endswith(".yaml"):
            assert yaml.safe_load(Path(strategy).read_text("utf-8"))["strategy"]
        else:
            check_trainer(Settings(callbacks=[], strategy=strategy, precision="bf16-mixed"), fit=True)
    with pytest.raises(ConfigError, match="fsdp"):
        check_trainer(Settings(callbacks=[], strategy="fsdp", precision="bf16-mixed"), fit=True)


@pytest.mark.parametrize(
    ("model", "gib", "samples"), [("paper", 79, 1), ("paper", 139, 2), ("paper", 0, 1), ("small", 79, 4)]
)
def test_the_batch_follows_the_memory(train_step, model, gib, samples):
    assert train_step.samples_of_a_step(model, gib << 30) == samples


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
    found |= measured(monkeypatch, capsys, "--tiles", "2", "--strategies", "fsdp", "ddp")
    assert list(found["failed"]) == ["2_tiles_fsdp"], "and the next case ran"
    assert "trainer.strategy fsdp is not supported" in found["failed"]["2_tiles_fsdp"]
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
