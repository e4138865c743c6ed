"""Batches that worker processes hand over in shared memory: the same bits as made in this process."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import reduce_storage
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.pixels import join
from alignvlm_pl.models.tiny import tiny_spec
from datamodules import WebDataModule
from datamodules.writer import ShardWriter


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 150, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 samples, of which every fourth has no picture, a batch of these among them."""
    path = tmp_path_factory.mktemp("data") / "set"
    with ShardWriter(path, name="set", source="made", license="CC0-1.0", samples_per_shard=4) as out:
        for number in range(12):
            images = [] if number % 4 == 0 else [png(number)]
            asked = [{"type": "image", "index": 0}] * len(images) + [{"type": "text", "text": "What?"}]
            answer = [{"type": "text", "text": str(number)}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.add({"messages": messages}, images, ["png"] * len(images))
    return path


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"token_budget": 400}])
def test_batches_of_workers_are_those_made_in_this_process(folder, tmp_path, options):
    processor = build_processor(tiny_spec(tmp_path))
    batches = {}
    for num_workers in (0, 2):
        options = {"batch_size": 1, "eval_batch_size": 5, "shuffle_buffer": 4} | options
        data = WebDataModule(train=[folder], val={"held": folder}, num_workers=num_workers, **options)
        data.attach(processor)
        train, val = list(data.train_dataloader()), list(data.val_dataloader()[0])
        data.teardown()
        assert train[-1]["pixel_values"].dtype == torch.uint8
        batches[num_workers] = train, val
    assert_same(batches[2][0], batches[0][0])
    assert_same(batches[2][1], batches[0][1])


class Joined(IterableDataset):
    """One batch: tiles, and whether they lay in shared memory before the queue took them."""

    def __init__(self, *, strategy: str, anonymous: bool) -> None:
        self.strategy, self.anonymous = strategy, anonymous

    def __iter__(self):
        assert get_worker_info() is not None
        torch.multiprocessing.set_sharing_strategy(self.strategy)
        if not self.anonymous:
            del os.memfd_create  # as on systems that do not have it; this process ends with the test
        tiles = join([np.full((count, 3, 50, 50), count, dtype=np.uint8) for count in (2, 0, 1)])
        before = tiles.untyped_storage().data_ptr()
        reduce_storage(tiles.untyped_storage())  # what the queue does
        yield tiles, tiles.is_shared(), tiles.untyped_storage().data_ptr() == before


@pytest.mark.parametrize(
    ("strategy", "anonymous"),
    [("file_descriptor", True), ("file_descriptor", False), ("file_system", True)],
)
def test_a_worker_joins_tiles_in_shared_memory_of_any_kind(strategy, anonymous):
    if strategy not in torch.multiprocessing.get_all_sharing_strategies() or not hasattr(os, "memfd_create"):
        pytest.skip("this system shares memory in another way")
    dataset = Joined(strategy=strategy, anonymous=anonymous)
    ((tiles, shared, stayed),) = DataLoader(dataset, batch_size=None, num_workers=1)
    assert (tiles.shape, tiles[:, 0, 0, 0].tolist()) == ((3, 3, 50, 50), [2, 2, 1])
    assert shared
    assert stayed
