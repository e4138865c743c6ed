"""A data worker that hangs in its start is found, and the workers are started again with the same batches."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import IterableDataset

from datamodules.loading.loader import WorkerItem, worker_place

PROGRAM = """
import json, logging, os, sys, time, torch
from datamodules.loading import roll_call
from datamodules.loading.loader import ShardLoader
from tests.unit.test_roll_call import Numbers

logging.basicConfig(format="%(message)s")
roll_call.START_SECONDS = float(sys.argv[2])
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # how long a worker that is stopped is waited for
hanging = [int(sys.argv[1])]
os.register_at_fork(
    after_in_child=lambda: hanging[0] and time.sleep(60),
    after_in_parent=lambda: hanging.__setitem__(0, max(hanging[0] - 1, 0)),
)
loader = ShardLoader(Numbers(), num_batches=4, num_workers=2, start_method="fork")
print(json.dumps([[batch["number"], batch["seed"]] for batch in loader]))
loader.close()
"""


class Numbers(IterableDataset[WorkerItem]):
    """Batches that tell their worker's seed."""

    def __iter__(self) -> Iterator[WorkerItem]:
        for number in range(worker_place()[0], 4, 2):
            yield WorkerItem(batch={"sources": [], "number": number, "seed": torch.initial_seed()})


def run(hanging: int, seconds: float) -> tuple[list[list[int]], str]:
    words = [sys.executable, "-c", PROGRAM, str(hanging), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_workers_are_started_again_where_one_hangs_and_make_the_same_batches():
    whole, told = run(0, 30.0)
    assert told == ""
    assert [number for number, _ in whole] == [0, 1, 2, 3]
    again, told = run(1, 1.0)
    assert again == whole
    assert told.count("a data worker has not started within 1 s; all are started again") == 1
