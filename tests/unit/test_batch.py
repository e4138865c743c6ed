"""The declared fields of a batch are those that the loaders give, and Lightning moves its tensors."""

from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.preprocessing.batch import Batch
from datamodules import WebDataModule
from datamodules.shards.writer import ShardWriter

PACKED = {"segment_ids", "document_tiles", "document_bounds", "longest_document", "rows", "documents_per_row"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> WebDataModule:
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "set", name="set", source="made", license="CC0-1.0") as out:
        turns = [("user", "Which?"), ("assistant", "this")]
        for _ in range(4):
            out.add(
                {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]},
                [],
                [],
            )
    sets: dict[str, Path] = {"held": folder / "set"}
    data = WebDataModule([folder / "set"], val=sets, benchmarks=sets, batch_size=2, num_workers=0)
    return data.attach(build_processor(tiny_spec(folder)))


def first(loader):
    return next(iter(loader))


def test_every_field_that_a_loader_gives_is_declared_with_its_kind(data):
    kinds = get_type_hints(Batch)
    train, (loss, generation) = (
        first(data.train_dataloader()),
        map(first, (data.val_dataloader()[0], data.predict_dataloader()[0])),
    )
    data.token_budget = 200
    packed = first(data.train_dataloader())
    for batch in (train, loss, generation, packed):
        assert Batch.__required_keys__ <= set(batch) <= set(kinds)
        assert {name for name in batch if kinds[name] is torch.Tensor} == {
            name for name, value in batch.items() if isinstance(value, torch.Tensor)
        }
    assert set(packed) >= PACKED
    assert not PACKED & set(train)
    found = {"visual_positions", "supervised_positions"}
    assert {"positions", "num_supervised", "step", "thumbnails"} | found == set(train) - Batch.__required_keys__
    assert found <= set(loss)
    assert not found & set(generation)
    assert {"references", "questions", "meta"} <= set(generation)
    assert {"dataset", "task", "skipped"} <= set(loss)


def test_lightning_moves_the_tensors_of_a_batch_and_keeps_the_rest(data):
    batch = first(data.val_dataloader()[0])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert set(moved) == set(batch)
    assert all(value.is_meta for value in moved.values() if isinstance(value, torch.Tensor))
    assert moved["keys"] == batch["keys"]
