"""Training state in a folder of shards: rows from any number of files, replaced as a whole, refused when damaged."""

import pytest
import torch

from alignvlm_pl import folder_checkpoints
from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.parallel import ShardedStrategy
from alignvlm_pl.sharded_checkpoint import (
    Pieces,
    make_whole,
    read_folder,
    replace_path,
    write_rank,
)
from alignvlm_pl.zero import ZeroStrategy
from callbacks.last_checkpoint import AtomicCheckpointIO


def rows(*local):
    return {"values": torch.tensor(local), "shape": [5]}


@pytest.fixture
def folder(tmp_path):
    """Five rows on three ranks, of which the last has none."""
    found = tmp_path / "last.ckpt"
    found.mkdir()
    for rank, local in enumerate(([1, 2, 3], [4, 5], [])):
        own = {
            "state_dict": {"a": rows(*local), "b": torch.tensor(7)},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0), "exp_avg": rows(*local)}}}],
        }
        write_rank(found, own, {"global_step": 2, "loops": {"x": [1]}}, rank=rank, ranks=3)
    return found


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("stop", range(6))
def test_any_rows_come_from_whichever_files_have_them(start, stop):
    pieces = Pieces([torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([])], (5,))
    assert pieces[slice(start, stop)].tolist() == [1, 2, 3, 4, 5][start:stop]


def test_a_run_that_is_not_sharded_reads_the_folder(folder):
    found = AtomicCheckpointIO().load_checkpoint(folder)
    assert found["state_dict"]["a"].tolist() == [1, 2, 3, 4, 5]
    assert int(found["state_dict"]["b"]) == 7
    assert found["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [1, 2, 3, 4, 5]
    assert (found["global_step"], found["loops"]) == (2, {"x": [1]})
    assert make_whole(read_folder(folder)).keys() == found.keys()


@pytest.mark.parametrize("name", ["rest.ckpt", "rank-00002-of-00003.ckpt"])
def test_a_folder_that_lacks_a_file_or_has_a_damaged_one(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name} is damaged or no checkpoint .*; remove .*last.ckpt"):
        read_folder(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"last.ckpt lacks {name}: it is no checkpoint folder, or was"):
        read_folder(folder)


def test_files_that_would_run_code_are_not_read(folder):
    torch.save({"ranks": 3, "x": pytest.raises}, folder / "rest.ckpt")
    with pytest.raises(CheckpointError, match=r"rest\.ckpt is damaged"):
        read_folder(folder)


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
def test_one_takes_the_place_of_the_other_whatever_they_are(tmp_path, new, old):
    target, partial = tmp_path / "last.ckpt", tmp_path / "partial"
    for path, kind in ((target, old), (partial, new)):
        if kind == "file":
            path.write_text(path.name)
        elif kind == "folder":
            path.mkdir()
            (path / "x").write_text(path.name)
    replace_path(partial, target)
    assert (target / "x" if new == "folder" else target).read_text() == "partial"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("writer", ["write_rank", "replace_path"])
def test_a_full_disk_loses_nothing_of_the_last_good_checkpoint(folder, monkeypatch, writer):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(folder_checkpoints, writer, refuse)
    with pytest.raises(
        CheckpointError, match=r"could not write checkpoint .*No space left.*earlier one is as it was"
    ):
        ShardedStrategy().save_checkpoint(
            {"state_dict": {"a": torch.zeros(3)}, "optimizer_states": []}, folder
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_taken_by_those_that_can_read_it_alone(folder, tmp_path):
    zero = object.__new__(ZeroStrategy)  # its constructor needs the package deepspeed
    with pytest.raises(CheckpointError, match="was not written by ZeRO, which reads no other"):
        zero.load_checkpoint(folder)
    (tmp_path / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "zero.ckpt" / "latest").write_text("checkpoint")
    for load in (AtomicCheckpointIO().load_checkpoint, ShardedStrategy().load_checkpoint):
        with pytest.raises(CheckpointError, match="it is no checkpoint folder"):
            load(tmp_path / "zero.ckpt")
