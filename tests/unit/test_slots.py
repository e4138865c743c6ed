"""Memory that is used again for batch after batch, and never while somebody can read it."""

import gc
import os

import numpy as np
import pytest
import torch

from alignvlm_pl.models import pixels
from datamodules import slots
from datamodules.slots import Sender, forget, unpack

SIDE = 64


@pytest.fixture(autouse=True)
def _no_memory_left_behind():
    yield
    for worker in {worker for worker, _ in slots._received}:
        forget(worker)


@pytest.fixture
def sender(monkeypatch):
    monkeypatch.setattr(slots, "LARGE_BYTES", 1000)
    found = Sender()
    monkeypatch.setattr(pixels, "_allocate", found.allocate)
    return found


def send(sender, value, tiles=2):
    """A batch as the main process gets it, and how it travelled."""
    joined = pixels.join([np.full((1, 3, SIDE, SIDE), value + number, np.uint8) for number in range(tiles)])
    packed = sender.pack({"pixel_values": joined, "num_tiles": torch.tensor([tiles]), "keys": ["a"]})
    return unpack(packed), packed["pixel_values"]


def test_a_batch_arrives_as_it_was_sent(sender):
    batch, travelled = send(sender, 7)
    assert batch["keys"] == ["a"]
    assert torch.equal(batch["num_tiles"], torch.tensor([2]))
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["pixel_values"].dtype == torch.uint8
    assert (
        batch["pixel_values"].amin(dim=(1, 2, 3)).tolist()
        == batch["pixel_values"].amax(dim=(1, 2, 3)).tolist()
    )
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [7, 8]
    assert travelled.memory is not None


def test_a_slot_travels_once_and_is_used_again_when_its_batch_is_gone(sender):
    places = set()
    for value in range(5):
        batch, travelled = send(sender, value)
        places.add((travelled.slot, batch["pixel_values"].data_ptr()))
        assert (travelled.memory is None) is (value > 0)
        del batch
    assert len(places) == 1


def test_what_somebody_keeps_is_never_written_over(sender):
    kept = [send(sender, value)[0]["pixel_values"] for value in range(4)]
    view = kept[2][1:, 0].reshape(-1)[3:]  # a view keeps the slot as well
    del kept[2]
    for value in (100, 110, 120):
        send(sender, value)
    assert [tiles[0, 0, 0, 0].item() for tiles in kept] == [0, 1, 3]
    assert set(view.tolist()) == {3}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_frees_no_slot(sender):
    """A worker that is forked while a batch waits for the garbage collector has it too, and collects it later."""
    batch, _ = send(sender, 1)
    gc.disable()
    try:
        batch["itself"] = batch
        del batch
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.read(reader, 1)
            gc.collect()
            os._exit(0)
        gc.collect()
        kept = send(sender, 2)[0]["pixel_values"]  # in the slot of the first
        os.write(writer, b"x")
        os.waitpid(child, 0)
        send(sender, 3)
    finally:
        gc.enable()
    assert kept[0, 0, 0, 0].item() == 2


def test_a_larger_batch_gets_a_slot_of_its_own_and_small_ones_stay_in_theirs(sender):
    first, _ = send(sender, 0)
    del first
    large, travelled = send(sender, 1, tiles=5)
    assert (travelled.slot, len(large["pixel_values"])) == (1, 5)
    del large
    assert send(sender, 2)[1].slot == 0


def test_batches_beyond_the_last_slot_are_copied_or_get_a_larger_slot(sender, monkeypatch):
    monkeypatch.setattr(slots, "MAX_SLOTS", 2)
    kept = [send(sender, value) for value in range(3)]
    assert [isinstance(travelled, np.ndarray) for _, travelled in kept] == [False, False, True]
    assert [batch["pixel_values"][0, 0, 0, 0].item() for batch, _ in kept] == [0, 1, 2]
    del kept[0]
    grown, travelled = send(sender, 50, tiles=5)
    assert travelled.memory is not None
    assert grown["pixel_values"][:, 0, 0, 0].tolist() == [50, 51, 52, 53, 54]
    assert kept[0][0]["pixel_values"][1, 0, 0, 0].item() == 2


def test_tiles_of_a_batch_that_was_never_made_leave_their_slot(sender):
    pixels.join([np.zeros((2, 3, SIDE, SIDE), np.uint8)])  # the sample turned out bad afterwards
    assert send(sender, 1)[1].slot == 1
    assert send(sender, 1)[1].slot == 0


def test_small_tiles_take_no_slot(sender, monkeypatch):
    monkeypatch.setattr(slots, "LARGE_BYTES", 10**6)
    batch, travelled = send(sender, 3)
    assert isinstance(travelled, np.ndarray)
    assert batch["pixel_values"][1, 0, 0, 0].item() == 4


def test_the_memory_of_a_worker_that_ended_goes_with_its_last_tensor(sender):
    batch, _ = send(sender, 9)
    forget(sender.worker)
    assert not slots._received
    assert batch["pixel_values"][1, 0, 0, 0].item() == 10


@pytest.mark.parametrize("anonymous", [True, False])
def test_memory_of_any_kind_begins_free_and_with_room(monkeypatch, anonymous):
    if not anonymous:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = slots._shared(5000)
    assert (len(memory), memory[0].item(), memory.is_shared()) == (5000, 0, True)
