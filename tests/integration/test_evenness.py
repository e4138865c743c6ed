"""Shards, ranks and workers that do not divide each other: every rank takes as many batches, no sample comes twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import TILE_PX, TOKENS_PER_TILE, tiny_tokenizer
from datamodules import WebDataModule
from datamodules.shards.manifest import load_manifest
from datamodules.shards.writer import ShardWriter

pytestmark = pytest.mark.timeout(60)
BATCH = 2
# Shards -> samples, and samples in a shard but for the last: 49 samples divide among no two ranks.
SETS = {1: (48, 48), 2: (48, 24), 5: (48, 10), 13: (49, 4)}
WORLDS = (1, 2, 3, 8)


@pytest.fixture(scope="session")
def processor() -> AlignVLMProcessor:
    tiling = {"tile_height": TILE_PX, "tile_width": TILE_PX, "max_tiles": 4}
    return AlignVLMProcessor(tiny_tokenizer(), tiling=tiling, tokens_per_tile=TOKENS_PER_TILE, chat_template="chatml")


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("sets")
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", "yes"))
    ]
    for shards, (samples, per_shard) in SETS.items():
        with ShardWriter(
            root / str(shards), name="set", source="made", license="CC0-1.0", samples_per_shard=per_shard
        ) as out:
            for _ in range(samples):
                out.add({"messages": turns}, [], [])
        assert len(load_manifest(root / str(shards)).shards) == shards
    return {shards: root / str(shards) for shards in SETS}


def module(folder: Path, processor: Any, *, rank: int, world: int, **options: Any) -> WebDataModule:
    settings = {"batch_size": BATCH, "eval_batch_size": 3, "shuffle_buffer": 8, **options}
    data = WebDataModule(train=[folder], val={"held": folder}, benchmarks={"held": folder}, **settings)
    return data.attach(processor, rank=rank, world_size=world)


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches if not batch["filler"] for key in batch["keys"]]


def train(data: WebDataModule, *, epochs: int) -> list[list[list[str]]]:
    """Keys of every batch of every epoch."""
    data.setup("fit")
    loader = data.train_dataloader()
    try:
        return [[batch["keys"] for batch in loader] for _ in range(epochs)]
    finally:
        data.teardown()


def check_epoch(batches: list[list[list[str]]], *, samples: int, world: int) -> None:
    """`batches` of each rank, in one epoch."""
    steps = samples // (BATCH * world)
    assert [len(own) for own in batches] == [steps] * world
    assert all(len(keys) == BATCH for own in batches for keys in own)
    found = Counter(key for own in batches for keys in own for key in keys)
    assert set(found.values()) == {1}
    assert len(found) == steps * BATCH * world
    if samples % (BATCH * world) == 0:
        assert found.keys() == {f"set-{number:08d}" for number in range(samples)}


def many(shards: int, world: int, workers: int) -> Any:
    marks = [pytest.mark.slow] if workers and world > 2 else []
    return pytest.param(shards, world, workers, marks=marks)


CASES = [many(shards, world, workers) for shards in SETS for world in WORLDS for workers in (0, 2)]


@pytest.mark.parametrize(("shards", "world", "workers"), CASES)
def test_training_is_even(sets, processor, shards, world, workers):
    samples = SETS[shards][0]
    ranks = [
        train(module(sets[shards], processor, rank=rank, world=world, num_workers=workers), epochs=2)
        for rank in range(world)
    ]
    check_epoch([epochs[0] for epochs in ranks], samples=samples, world=world)
    steps = samples // (BATCH * world)
    if samples % (BATCH * world) == 0:
        check_epoch([epochs[1] for epochs in ranks], samples=samples, world=world)
        assert ranks[0][0] != ranks[0][1]
    else:
        # The second begins with what the first has left, so that no sample comes a third time before all came twice.
        assert {len(epochs[1]) for epochs in ranks} == {steps}
        both = Counter(key for epochs in ranks for epoch in epochs for keys in epoch for key in keys)
        assert max(both.values()) <= 2
        assert sum(both.values()) == 2 * steps * BATCH * world
        assert len(both) >= min(samples, 2 * steps * BATCH * world)


@pytest.mark.parametrize(("shards", "world", "workers"), CASES)
def test_validation_has_each_sample_once(sets, processor, shards, world, workers):
    samples = SETS[shards][0]
    for use in ("val", "benchmark"):
        seen: Counter[str] = Counter()
        numbers = set()
        for rank in range(world):
            data = module(sets[shards], processor, rank=rank, world=world, num_workers=workers)
            data.setup("validate")
            loader = data.val_dataloader()[0] if use == "val" else data.benchmark_dataloader("held")
            batches = list(loader)
            numbers |= {len(batches), len(loader)}
            seen.update(keys_of(batches))
        assert seen == Counter(f"set-{number:08d}" for number in range(samples))
        assert len(numbers) == 1


def test_fewer_samples_than_a_step_needs_is_said_before_training(sets, processor):
    with pytest.raises(ConfigError, match=r"batch_size=7 on 8 ranks needs 56 samples per step.* have 48"):
        module(sets[1], processor, rank=0, world=8, batch_size=7).setup("fit")


def test_a_source_without_datasets_is_named_before_training(sets, processor):
    data = WebDataModule(mixture={"a": {"sets": [sets[1]]}, "b": {"weight": 5}}).attach(processor)
    with pytest.raises(ConfigError, match=r"mixture\.b\.sets names no folder"):
        data.setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_without_any_valid_sample_ends_the_run_whatever_is_allowed(tmp_path, processor, workers):
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0") as out:
        for _ in range(5):
            out.add({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}, [], [])
    data = module(tmp_path / "set", processor, rank=0, world=1, num_workers=workers, max_unlabelled_share=1.0)
    with pytest.raises(DataError, match="none of the first 200 samples can be trained on"):
        train(data, epochs=1)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_take_the_batches_of_a_single_process(sets, processor):
    for rank in range(2):
        options = {"rank": rank, "world": 2}
        expected = train(module(sets[13], processor, num_workers=0, **options), epochs=2)
        data = module(sets[13], processor, num_workers=2, **options)
        assert train(data, epochs=2) == expected
