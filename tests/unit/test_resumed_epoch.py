"""Counts of a resumed epoch on another number of ranks, and a checkpoint of another DataModule."""

from types import SimpleNamespace
from typing import Any

import pytest

from alignvlm_pl.errors import CheckpointError
from callbacks.resumed_epoch import ResumedEpoch


class WebDataModule:
    pass


def checkpoint(world: int, *, ready: int, completed: int) -> dict[str, Any]:
    counts = {"ready": ready, "started": ready, "processed": ready, "completed": completed}
    progress = {"current": dict(counts), "total": dict(counts), "is_last_batch": False}
    return {
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
        "WebDataModule": {"epoch_samples": 9, "ranks": [{}] * world},
    }


def load(found: dict[str, Any], world: int, data: Any = None) -> dict[str, int]:
    trainer: Any = SimpleNamespace(world_size=world, datamodule=data or WebDataModule())
    ResumedEpoch().on_load_checkpoint(trainer, None, found)  # type: ignore[arg-type]
    return found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]


@pytest.mark.parametrize(("before", "after", "expected"), [(2, 2, 8), (2, 1, 16), (2, 4, 4), (4, 2, 16)])
def test_batches_are_counted_in_those_of_the_ranks_there_are(before, after, expected):
    assert load(checkpoint(before, ready=8, completed=8), after)["completed"] == expected
    # Written inside of a batch's last hook: Lightning tells by the difference of one.
    counts = load(checkpoint(before, ready=8, completed=7), after)
    assert (counts["processed"], counts["completed"]) == (expected, expected - 1)


def test_a_checkpoint_without_a_stream_is_left_as_it_is():
    found = checkpoint(2, ready=8, completed=8)
    del found["WebDataModule"]
    assert load(found, 4)["completed"] == 8


def test_the_place_in_another_modules_data_is_not_lost_in_silence():
    with pytest.raises(
        CheckpointError, match=r"was trained with WebDataModule, data\.class_path is SimpleNamespace"
    ):
        load(checkpoint(2, ready=8, completed=8), 2, SimpleNamespace())
