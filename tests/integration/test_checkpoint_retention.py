"""Which checkpoints are kept, which one a run resumes from, and folders that are full or read-only."""

import gc
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from callbacks.last_checkpoint import checkpoint_bytes
from callbacks.preemption import Preemption
from tests.integration.checkpoint_files import LAST, contents, error_of, names, unfinished_run


@pytest.mark.parametrize(
    ("policy", "kept"),
    [([], [5]), (["--checkpoint_keep_last=2"], [4, 5]), (["--checkpoint_keep_every_n_steps=2"], [2, 4, 5])],
)
def test_older_checkpoints_are_kept_by_policy(world, tmp_path, policy, kept):
    folder = world.fit(tmp_path / "run", "--stage.max_steps=5", "--checkpoint_every_n_steps=1", *policy)
    assert names(folder) == ["last.ckpt", *(f"step{step:08d}.ckpt" for step in kept)]
    assert os.readlink(folder / LAST) == "step00000005.ckpt"
    for step in kept:
        assert torch.load(folder / f"checkpoints/step{step:08d}.ckpt", weights_only=True)["global_step"] == step


def test_checkpoints_by_minutes_follow_the_clock(world, tmp_path, monkeypatch):
    ticks = itertools.count(step=40.0)  # at the start, at each step and behind each checkpoint
    monkeypatch.setattr("callbacks.last_checkpoint.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    when = ["--checkpoint_every_n_steps=null", "--checkpoint_every_minutes=1", "--checkpoint_keep_last=9"]
    folder = world.fit(tmp_path / "run", "--stage.max_steps=5", *when)
    assert names(folder) == ["last.ckpt", *(f"step{step:08d}.ckpt" for step in (2, 4, 5))]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_save_when_it_is_time_for_the_first_by_the_reduction_of_the_signals(monkeypatch, rank):
    sent = []

    def all_reduce(flags):
        sent.append(flags.tolist())
        flags.copy_(torch.tensor([0.0, 1.0]))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, world_size=2, is_global_zero=rank == 0, global_step=1)
    preemption = Preemption()
    preemption.is_time_to_save = lambda: True
    preemption.on_train_batch_end(trainer)
    assert (preemption.leaving, preemption.save_due) == (False, True)
    preemption.on_train_batch_end(trainer)
    assert not preemption.save_due, "between two micro batches nothing is saved"
    assert sent == [[0.0, float(rank == 0)]]


def test_an_older_checkpoint_can_be_resumed(world, tmp_path):
    options = ["--stage.max_steps=4", "--checkpoint_every_n_steps=1", "--checkpoint_keep_last=4"]
    folder = world.fit(tmp_path / "run", *options)
    before = torch.load(folder / LAST, weights_only=True)
    shutil.rmtree(folder / "hf")
    world.fit(folder, *options, f"--ckpt_path={folder / 'checkpoints/step00000002.ckpt'}")
    after = torch.load(folder / LAST, weights_only=True)
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())


def test_what_a_killed_run_left_half_written_is_cleared_away(world, trained, tmp_path):
    folder = unfinished_run(trained, tmp_path / "run")
    (folder / "checkpoints/step00000009.ckpt.partial").write_bytes(b"half")
    (folder / "checkpoints/step00000003.ckpt").write_bytes(b"written, but its run died before the link moved")
    world.fit(folder, "--stage.max_steps=3")
    assert names(folder) == ["last.ckpt", "step00000003.ckpt"]
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--checkpoint_every_n_steps=0", "checkpoint_every_n_steps=0: expected at least 1"),
        ("--checkpoint_keep_last=0", "checkpoint_keep_last=0: expected at least 1"),
        ("--checkpoint_every_minutes=0", "checkpoint_every_minutes=0.0: expected more than 0, or null"),
        (
            "--checkpoint_keep_every_n_steps=700",
            "=700: expected a multiple of checkpoint_every_n_steps=500, or null",
        ),
        (
            "--checkpoint_every_n_steps=null --checkpoint_keep_every_n_steps=700",
            "=700: expected a multiple of checkpoint_every_n_steps=null, or null",
        ),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(world, tmp_path, capsys, option, message):
    assert message in error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", *option.split()))


def test_last_is_no_error_on_the_first_start_and_resumes_later(world, tmp_path, capsys):
    folder = tmp_path / "run"
    world.fit(folder, "--ckpt_path=last", "--stage.max_steps=2")
    shutil.rmtree(folder / "hf")
    world.fit(folder, "--ckpt_path=latest", "--stage.max_steps=3")
    assert contents(folder)["samples_seen"] == {"made": 12}
    assert world.run("test", "--run_dir", folder, "--ckpt_path=last") == 0
    assert json.loads((folder / "results.json").read_text())["benchmarks"]["held"]["num"] == 5
    status = world.run("test", "--run_dir", tmp_path / "none", "--ckpt_path=last")
    assert "last.ckpt: there is no such file" in error_of(capsys, status)


def test_a_link_to_a_state_that_is_gone_is_no_fresh_start(world, trained, tmp_path, capsys):
    folder = unfinished_run(trained, tmp_path / "run")
    (folder / LAST).resolve().unlink()
    error = error_of(capsys, world.run("fit", "--run_dir", folder))
    assert "last.ckpt points to step00000002.ckpt, which is gone: give another state by --ckpt_path" in error


# --- full and unwritable folders ------------------------------------------------------------------


@pytest.mark.parametrize(("free", "keep_last"), [(3_500_000, 1), (4_900_000, 2)])
def test_a_disk_without_room_for_what_a_stage_writes_is_refused_before_the_first_step(
    world, tmp_path, capsys, monkeypatch, free, keep_last
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("callbacks.last_checkpoint.shutil.disk_usage", lambda path: usage._replace(free=free))
    options = ["--stage.lr_vision=null", "--checkpoint_keep_last", keep_last]
    status = world.run("fit", "--run_dir", tmp_path / "run", *options)
    # 146,470 float32 weights, and two moments for each of the 109,958 that train: 1.47 MB a checkpoint, one of them
    # written beside those that are kept, and 0.59 MB in `hf/`.
    output = error_of(capsys, status)
    assert "has 0.00 GB free, the checkpoints and the end of this stage take 0.00 GB: free some space" in output
    assert names(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 7 MB; mounting one takes the rights of root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    gc.collect()  # a run that failed holds its event file open
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_the_command_resumes(world, small_disk, capsys):
    options = ["--stage.max_steps=6", "--checkpoint_every_n_steps=1", "--benchmark.at_stage_end=false"]
    folder = small_disk / "run"
    status = world.run("fit", "--run_dir", folder, *options, "--checkpoint_keep_every_n_steps=1")
    assert "No space left on device" in error_of(capsys, status)
    kept = len(names(folder)) - 1  # of 1.8 MB each
    assert 2 <= kept <= 3
    assert names(folder) == ["last.ckpt", *(f"step{step:08d}.ckpt" for step in range(1, kept + 1))]
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == kept
    assert not (folder / "hf").exists()
    status = world.run("fit", "--run_dir", folder, *options, "--checkpoint_keep_every_n_steps=1")
    assert "the end of this stage take" in error_of(capsys, status), "before another step is trained"
    world.fit(folder, *options)
    assert contents(folder)["samples_seen"] == {"made": 6 * 4}


def test_a_checkpoint_is_about_as_large_as_was_reckoned(world, trained):
    module = pl.LightningModule()
    module.layer = torch.nn.Linear(10, 10, bias=False)
    assert checkpoint_bytes(module) == 3 * 400
    assert checkpoint_bytes(module, averaged=True) == 4 * 400
    module.bfloat16()
    assert checkpoint_bytes(module) == 3 * 200
    module.float()
    module.requires_grad_(False)
    assert checkpoint_bytes(module) == 400
    reckoned = 146_470 * 4 * 3
    assert reckoned < (trained / LAST).stat().st_size < 1.3 * reckoned


def test_a_checkpoint_folder_that_cannot_be_one_is_refused(world, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file")
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run"))
    assert f"{tmp_path / 'run/checkpoints'} cannot be written" in error
