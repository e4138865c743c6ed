"""Batches of worker processes: bit for bit those made in this process."""

import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.tiny import tiny_spec
from datamodules import WebDataModule
from datamodules.loading.loader import ShardLoader, WorkerItem
from datamodules.shards.writer import ShardWriter


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 150, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
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


class Numbers(IterableDataset):
    """Twenty batches of two tiles, filled with their number."""

    def __iter__(self):
        for number in range(20):
            tiles = torch.full((2, 3, 500, 500), number, dtype=torch.uint8)
            yield WorkerItem(batch={"pixel_values": tiles, "sources": ["a"]})


def test_an_evaluation_ends_its_workers_with_its_last_batch():
    """Lightning takes as many batches as there are, and does not ask for the end."""
    loader = ShardLoader(Numbers(), num_batches=20, num_workers=1)
    for _ in range(2):
        batches = iter(loader)
        last = [next(batches)["pixel_values"] for _ in range(20)][-1]
        assert not multiprocessing.active_children()
        assert set(last.flatten().tolist()) == {19}
    batches = iter(loader)
    next(batches)
    del batches  # left in the middle
    assert not multiprocessing.active_children()


def test_batches_that_are_kept_are_not_overwritten_by_later_ones():
    kept = [batch["pixel_values"] for batch in ShardLoader(Numbers(), num_batches=20, num_workers=1)]
    assert [set(tiles.flatten().tolist()) for tiles in kept] == [{number} for number in range(20)]
