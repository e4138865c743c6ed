"""Ctrl-C and a closed terminal end a run as a scheduler does: with a checkpoint, a line and an exit status.

Sources: Lightning-AI/pytorch-lightning#19916, #11924, PR#19976, unslothai/unsloth PR#11151, neural-amp-modeler#501.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.stop_signals import INTERRUPTED, exit_status, listening, received

ROOT = Path(__file__).parents[2]


def at_step(monkeypatch: pytest.MonkeyPatch, name: str, send: Any, *, step: int = 2) -> None:
    """Call `send` within a step of `training_step` or `validation_step`, counted from 1."""
    method = getattr(AlignVLMModule, name)

    def sending(self: Any, *args: Any, **options: Any) -> Any:
        if self.trainer.global_step == step - 1:
            send()
        return method(self, *args, **options)

    monkeypatch.setattr(AlignVLMModule, name, sending)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_run_saves_its_step_says_so_and_resumes(world, tmp_path, capfd, caplog, monkeypatch, name):
    options = ["--run_dir", tmp_path, "--benchmark.at_stage_end=false"]
    with monkeypatch.context() as patch:
        at_step(patch, "training_step", lambda: os.kill(os.getpid(), getattr(signal, name)))
        assert world.run("fit", *options) == INTERRUPTED == 130
    assert f"asked to stop by {name}: left after step 2" in caplog.text
    if name == "SIGINT":
        assert "leaving as soon as nothing is lost; Ctrl-C again leaves at once" in capfd.readouterr().err
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["last.ckpt", "step00000002.ckpt"]
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "owner.json").exists()
    assert world.run("fit", *options) == 0
    assert "after step 2 of 3" in caplog.text


def test_a_scheduler_s_status_is_another_one():
    assert exit_status(["SIGTERM"]) == 85
    assert exit_status(["SIGTERM", "SIGINT"]) == 130, "nobody wants it started again"


@pytest.mark.parametrize(("pause", "status"), [(0.0, 7), (0.5, 130)])
def test_a_second_ctrl_c_leaves_at_once_and_says_what_is_lost(pause, status):
    """Two that come together are one: a launcher passes on what the terminal sends to all."""
    program = (
        "import os, signal, time\n"
        "from alignvlm_pl.utils import stop_signals\n"
        "stop_signals.listen()\n"
        "stop_signals.progress = 512, 500\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        f"time.sleep({pause})\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "raise SystemExit(7)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert done.returncode == status
    assert ("lost are 12 steps behind the checkpoint of step 500" in done.stderr) == (status == 130)


def test_what_nohup_ignores_stays_ignored():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_an_evaluation_says_that_it_resumes(world, tmp_path, capsys, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    at_step(monkeypatch, "test_step", interrupt, step=1)
    earlier = signal.getsignal(signal.SIGINT)
    try:
        assert world.run("test", "--run_dir", tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, earlier)  # Lightning ignores it from now on
    assert "interrupted: the same command resumes" in capsys.readouterr().err
