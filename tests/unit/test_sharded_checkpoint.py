"""Training state in a folder of shards: rows from any number of files, replaced as a whole, refused when damaged."""

import pytest
import torch

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.strategies import fsdp
from alignvlm_pl.strategies.checkpoint_io import AtomicCheckpointIO
from alignvlm_pl.strategies.fsdp import ShardedStrategy
from alignvlm_pl.strategies.sharded_checkpoint import (
    Pieces,
    load_file,
    make_whole,
    rank_state,
    read_folder,
    write_rank,
)
from alignvlm_pl.utils.atomic_files import replace_path


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


def test_a_file_of_one_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged or no checkpoint \(it holds a Tensor\)"):
        load_file(tmp_path / "x.pt")


@pytest.mark.parametrize("trusted", [False, True])
def test_tensors_of_a_file_are_mapped_and_not_read(tmp_path, monkeypatch, trusted):
    torch.save({"a": torch.arange(3)}, tmp_path / "x.ckpt")
    load, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False if trusted else None)
    assert found["a"].tolist() == [0, 1, 2]
    assert asked == [{"map_location": "cpu", "mmap": True, "weights_only": not trusted}]


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
    monkeypatch.setattr(fsdp, writer, refuse)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*No space left.*earlier one is as it was"):
        ShardedStrategy().save_checkpoint({"state_dict": {"a": torch.zeros(3)}, "optimizer_states": []}, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_in_another_format_is_refused(tmp_path):
    (tmp_path / "other.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "other.ckpt" / "latest").write_text("checkpoint")
    for reader in (AtomicCheckpointIO(), ShardedStrategy()):
        with pytest.raises(CheckpointError, match="it is no checkpoint folder"):
            reader.load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("stop", range(4))
def test_rows_of_a_matrix_come_from_whichever_files_have_them(start, stop):
    whole = torch.arange(6).view(3, 2)
    pieces = Pieces([whole[:2], torch.tensor([], dtype=torch.int64), whole[2:]], (3, 2))
    assert torch.equal(pieces[slice(start, stop)], whole[start:stop])
    assert torch.equal(pieces.whole(), whole)


def test_what_all_ranks_have_whole_is_written_by_the_first_alone(tmp_path):
    for rank in range(2):
        checkpoint = {"state_dict": {"b": torch.tensor(7.0)}, "global_step": 3}
        own = rank_state(checkpoint, rank=rank)
        assert own["state_dict"]["b"] == (None if rank else 7.0)
        own["state_dict"]["a"] = {"values": torch.tensor([[2.0 * rank, 2.0 * rank + 1]]), "shape": [2, 2]}
        write_rank(tmp_path, own, checkpoint, rank=rank, ranks=2)
    found = make_whole(read_folder(tmp_path))
    assert found["state_dict"]["a"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert found["state_dict"]["b"] == 7.0
