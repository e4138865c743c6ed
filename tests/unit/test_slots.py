"""Memory that is used again for batch after batch, and never while somebody can read it."""

import gc
import os

import numpy as np
import pytest
import torch

from datamodules.loading import shared_tiles as slots
from datamodules.loading.shared_tiles import Sender, forget, unpack

SIDE = 64
TILE = 3 * SIDE * SIDE


@pytest.fixture(autouse=True)
def _no_memory_left_behind():
    yield
    for worker in {worker for worker, _ in slots._received}:
        forget(worker)


@pytest.fixture
def sender(monkeypatch):
    monkeypatch.setattr(slots, "SMALL_BYTES", 1000)
    monkeypatch.setattr(slots, "SLOT_BYTES", 4 * TILE)
    return Sender()


def cut(sender, value, tiles=1):
    """Tiles as a picture is cut into them."""
    found = sender.empty((tiles, 3, SIDE, SIDE))
    found[:] = np.arange(value, value + tiles, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return found


def send(sender, value, tiles=2):
    """A batch as the main process gets it, and how it travelled."""
    return pack(sender, [cut(sender, value + number) for number in range(tiles)])


def pack(sender, arrays):
    joined = torch.from_numpy(sender.join(arrays))
    packed = sender.pack({"pixel_values": joined, "num_tiles": torch.tensor([len(joined)]), "keys": ["a"]})
    return unpack(packed), packed["pixel_values"]


def values(batch):
    """The value of each tile, all pixels of which are equal."""
    flat = batch["pixel_values"].flatten(1)
    assert torch.equal(flat.amin(1), flat.amax(1))
    return flat[:, 0].tolist()


def test_a_batch_arrives_as_it_was_sent(sender):
    batch, travelled = send(sender, 7)
    assert batch["keys"] == ["a"]
    assert torch.equal(batch["num_tiles"], torch.tensor([2]))
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["pixel_values"].dtype == torch.uint8
    assert values(batch) == [7, 8]
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


def test_tiles_are_joined_where_they_were_cut(sender):
    arrays = [cut(sender, 1), np.zeros((0, 3, SIDE, SIDE), np.uint8), cut(sender, 2, tiles=2)]
    joined = sender.join([sender.join(arrays[:2]), arrays[2]])  # a conversation's, then a batch's
    assert joined.ctypes.data == arrays[0].ctypes.data
    assert joined[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "order", [[0, 2], [1, 0, 2], [2, 1], [1, 1]], ids=["hole", "other order", "backwards", "twice"]
)
def test_tiles_that_do_not_lie_one_after_another_are_copied(sender, order):
    """As where a sample between them turned out bad."""
    arrays = [cut(sender, number) for number in range(3)]
    batch, travelled = pack(sender, [arrays[number] for number in order])
    assert isinstance(travelled, slots.InSlot)
    assert values(batch) == order


def test_tiles_of_other_memory_are_copied(sender):
    own, other = cut(sender, 1), np.full((1, 3, SIDE, SIDE), 2, np.uint8)
    assert values(pack(sender, [own, other])[0]) == [1, 2]
    assert values(pack(sender, [other])[0]) == [2]


def test_a_batch_larger_than_its_slot_gets_a_larger_one_and_so_do_those_after_it(sender):
    first, _ = send(sender, 0)
    del first
    large, travelled = send(sender, 1, tiles=6)  # the slots have room for four
    assert (travelled.slot, values(large)) == (1, [1, 2, 3, 4, 5, 6])
    del large
    kept = [send(sender, number)[0] for number in range(2)]  # in both
    arrays = [cut(sender, number) for number in range(6)]
    batch, travelled = pack(sender, arrays)
    assert (travelled.slot, values(batch)) == (2, [0, 1, 2, 3, 4, 5])
    assert batch["pixel_values"].data_ptr() == arrays[0].ctypes.data, "nothing was copied"
    assert [values(batch) for batch in kept] == [[0, 1], [1, 2]]


def test_tiles_that_have_to_move_are_not_moved_onto_themselves(sender):
    """The slot that is too full is free, and has room for them once it is begun anew."""
    arrays = [cut(sender, number) for number in range(4)]
    batch, travelled = pack(sender, [arrays[number] for number in (3, 1, 0, 2)])
    assert (travelled.slot, values(batch)) == (1, [3, 1, 0, 2])


def test_a_batch_of_many_slots_is_joined_from_all_of_them(sender):
    """Each sample is joined by itself first; those beyond the first slot have to move, and so do those after them."""
    none = np.zeros((0, 3, SIDE, SIDE), np.uint8)
    for _ in range(2):
        samples = [sender.join([none, cut(sender, number, tiles=2)]) for number in range(1, 14, 2)]
        cut(sender, 99)  # of a sample that turned out bad
        batch, _ = pack(sender, samples)
        assert values(batch) == list(range(1, 15))
        del batch


def test_a_slot_carries_one_array(sender):
    first, second = cut(sender, 1), cut(sender, 2)
    packed = sender.pack({"one": torch.from_numpy(first), "two": torch.from_numpy(second)})
    assert isinstance(packed["one"], slots.InSlot)
    assert isinstance(packed["two"], np.ndarray)


def test_batches_beyond_the_last_slot_are_copied_or_get_a_larger_slot(sender, monkeypatch):
    monkeypatch.setattr(slots, "MAX_SLOTS", 2)
    kept = [send(sender, value) for value in range(3)]
    assert [isinstance(travelled, np.ndarray) for _, travelled in kept] == [False, False, True]
    assert [values(batch) for batch, _ in kept] == [[0, 1], [1, 2], [2, 3]]
    del kept[0]
    grown, travelled = send(sender, 50, tiles=5)
    assert travelled.memory is not None
    assert values(grown) == [50, 51, 52, 53, 54]
    assert values(kept[0][0]) == [1, 2]


def test_tiles_of_a_batch_that_was_never_made_leave_their_slot(sender):
    for _ in range(9):
        cut(sender, 0)  # the sample turned out bad afterwards
        sender.discard()
    assert send(sender, 1)[1].start == 0
    sender.discard()
    assert send(sender, 1)[1].slot == 0


def test_small_tiles_take_no_slot(sender, monkeypatch):
    monkeypatch.setattr(slots, "SMALL_BYTES", 10**6)
    first, travelled = send(sender, 3)
    assert isinstance(travelled, np.ndarray)
    send(sender, 7)
    assert values(first) == [3, 4]


def test_the_memory_of_a_worker_that_ended_goes_with_its_last_tensor(sender):
    batch, _ = send(sender, 9)
    forget(sender.worker)
    assert not slots._received
    assert values(batch) == [9, 10]


@pytest.mark.parametrize("anonymous", [True, False])
def test_memory_of_any_kind_begins_free_and_with_room(monkeypatch, anonymous):
    if not anonymous:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = slots._shared(5000)
    assert (len(memory), memory[0].item(), memory.is_shared()) == (5000, 0, True)
