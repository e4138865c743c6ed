"""Damaged, missing or foreign checkpoints and folders: exit status 1, a short error, nothing half-written."""

import dataclasses
import errno
import resource
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.strategies.checkpoint_io import AtomicCheckpointIO
from tests.integration.checkpoint_files import error_of


@pytest.fixture(scope="session")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.fit(tmp_path_factory.mktemp("bad") / "run", "--stage.max_steps=1")


def test_missing_checkpoint(world, tmp_path, capsys):
    status = world.run("test", "--run_dir", tmp_path / "run", "--ckpt_path", tmp_path / "none.ckpt")
    assert "none.ckpt: there is no such file" in error_of(capsys, status)


@pytest.mark.parametrize("command", ["test", "fit"])
def test_truncated_checkpoint(world, trained, tmp_path, capsys, command):
    cut = tmp_path / "run/checkpoints/last.ckpt"
    cut.parent.mkdir(parents=True)
    cut.write_bytes((trained / "checkpoints/last.ckpt").read_bytes()[:2000])
    options = ["--ckpt_path", cut] if command == "test" else []
    error = error_of(capsys, world.run(command, "--run_dir", tmp_path / "run", *options))
    assert "is damaged" in error
    assert "2000 bytes" in error


@pytest.mark.parametrize("source", ["ckpt_path", "model.weights", "stage.init_from"])
def test_weights_of_another_model(world, trained, tmp_path, capsys, source):
    from alignvlm_pl.models.tiny import tiny_spec

    spec = dataclasses.asdict(tiny_spec(tmp_path / "tokenizer", llm={"width": 32}))
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump({"spec": spec}))
    path = trained / ("checkpoints/last.ckpt" if source == "ckpt_path" else "hf")
    command = "fit" if source == "stage.init_from" else "test"
    status = world.run(command, "--run_dir", tmp_path / "run", f"--model={model}", f"--{source}", path)
    error = error_of(capsys, status)
    assert "another model" in error
    assert "use the model config" in error


def test_checkpoint_of_another_stage(world, trained, tmp_path, capsys):
    checkpoint = trained / "checkpoints/last.ckpt"
    status = world.run("fit", "--run_dir", tmp_path / "run", "--ckpt_path", checkpoint, "--stage.name=other")
    error = error_of(capsys, status)
    assert "stage 'all'" in error
    assert "stage.init_from" in error


@pytest.mark.parametrize("source", ["model.weights", "stage.init_from"])
def test_missing_weights_folder(world, tmp_path, capsys, source):
    command = "fit" if source == "stage.init_from" else "test"
    status = world.run(command, "--run_dir", tmp_path / "run", f"--{source}", tmp_path / "none")
    assert f"{tmp_path / 'none'} has no" in error_of(capsys, status)


def test_a_parent_that_cannot_be_read(world, trained, tmp_path, capsys):
    parent = tmp_path / "hf"
    shutil.copytree(trained / "hf", parent)
    (parent / "model.safetensors").unlink()
    (parent / "model.safetensors").mkdir()
    status = world.run("fit", "--run_dir", tmp_path / "run", "--stage.init_from", parent)
    assert f"{parent} cannot be read: " in error_of(capsys, status)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("connector={type: alin}", "connector type 'alin' is unknown; did you mean 'align'?"),
        (
            "connector={type: align, gane_init: 2}",
            "connector 'align' has no option 'gane_init'; did you mean 'gain_init'?",
        ),
        ("vision.pretrained=/none/such", "/none/such"),
        ("llm.pretrained=embedded:smolm2", "did you mean 'smollm2'?"),
    ],
)
def test_parts_of_the_model_that_do_not_exist(world, tmp_path, capsys, option, message):
    assert message in error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", f"--model.spec.{option}"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("trainer.devices=0", "trainer.devices=0: expected at least 1"),
        ("trainer.devices=two", "trainer.devices=two: expected at least 1"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0: expected at least 1"),
        ("trainer.devices=0,1", "is not a multiple of data batch_size 2 x 2 devices = 4"),
        ("progress.every_n_steps=0", "progress.every_n_steps=0: expected at least 1"),
    ],
)
def test_sizes_and_intervals_that_cannot_be_meant(world, tmp_path, capsys, option, message):
    options = ["--run_dir", tmp_path / "run", "--stage.global_batch_size=6"]
    assert message in error_of(capsys, world.run("fit", *options, f"--{option}"))


def test_ranks_of_two_machines_that_share_a_process_number_look_at_one_folder(tmp_path, monkeypatch):
    from alignvlm_pl.cli.lightning_cli import _check_writable

    write_text = Path.write_text

    def and_the_other_removes_it(self: Path, text: str) -> int:
        written = write_text(self, text)
        self.unlink()
        return written

    monkeypatch.setattr(Path, "write_text", and_the_other_removes_it)
    _check_writable(tmp_path)


def test_a_cpu_is_one_device_whatever_else_the_machine_has(monkeypatch):
    from alignvlm_pl.cli.lightning_cli import count_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = {name: count_devices({"accelerator": name, "devices": "auto", "num_nodes": 1}) for name in ("cpu", "gpu")}
    assert found == {"cpu": 1, "gpu": 8}


def test_changed_parent_weights(world, trained, tmp_path, capsys):
    parent = tmp_path / "hf"
    shutil.copytree(trained / "hf", parent)
    weights = parent / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    status = world.run("fit", "--run_dir", tmp_path / "run", "--stage.init_from", parent)
    assert "were changed or damaged" in error_of(capsys, status)


def test_run_dir_that_cannot_be_a_folder(world, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    status = world.run("fit", "--run_dir", tmp_path / "file" / "run")
    assert "cannot be written" in error_of(capsys, status)


def test_run_dir_with_a_finished_stage_is_not_trained_over(world, trained, capsys):
    assert "holds a finished stage" in error_of(capsys, world.run("fit", "--run_dir", trained))


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(world, tmp_path, capsys, monkeypatch):
    options = [
        "--run_dir",
        tmp_path / "run",
        "--checkpoint_every_n_steps=1",
        "--benchmark.at_stage_end=false",
    ]
    saves = []

    def full(checkpoint: Any, file: Any) -> None:
        saves.append(file.name)
        file.write(b"half")
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("alignvlm_pl.strategies.sharded_checkpoint.torch.save", full)
    error = error_of(capsys, world.run("fit", *options))
    assert "No space left on device" in error
    assert "run_dir" in error
    assert [Path(name).name for name in saves] == [f"step0000000{step}.ckpt.partial" for step in (1, 2)]
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "step00000001.ckpt"]
    assert last.read_bytes() == b"half", "the state that was written before the disk was full"
    assert not (tmp_path / "run/hf").exists()


def test_a_checkpoint_is_readable_by_its_owner_group_like_any_file(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "folder" / "last.ckpt")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder/last.ckpt", tmp_path / "plain")]
    assert modes[0] == modes[1]


def test_a_refused_write_tells_the_reason(tmp_path):
    """A real refusal of the operating system, which torch's writer would hide behind an error of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_weights_folder_is_whole_or_absent(tmp_path):
    from alignvlm_pl.training.export import export

    class Full:
        def save_pretrained(self, folder: Path, **_) -> None:
            folder.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "earlier").write_text("x")
    with pytest.raises(CheckpointError, match="free some space or set another run_dir"):
        export(Full(), Full(), tmp_path / "hf", {})
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "earlier").exists()
