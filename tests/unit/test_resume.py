"""Resuming from a checkpoint: the same batches on the same ranks, every sample once on others, no other data."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import ConfigError
from datamodules import WebDataModule
from datamodules.shards.writer import ShardWriter
from tests.unit.light_processors import Words


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Three sets of 61, 17 and 5 samples in uneven shards."""
    found = {}
    for name, count in (("a", 61), ("b", 17), ("c", 5)):
        found[name] = tmp_path_factory.mktemp("sets") / name
        with ShardWriter(found[name], name=name, source=name, license="none", samples_per_shard=7) as out:
            for number in range(count):
                turns = [("user", "x" * (1 + 7 * number % 13)), ("assistant", "y")]
                messages = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
                out.add({"messages": messages}, [], [])
    return found


MODES: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 3},
    "sorted": {"batch_size": 2, "length_window": 4},
    "packed": {"batch_size": 2, "token_budget": 20, "pack_window": 16},
}


def modules(sets: dict[str, Path], world: int, state: Any = None, **options: Any) -> list[WebDataModule]:
    found = []
    for rank in range(world):
        sources = {
            name: {"sets": [folder], "weight": weight}
            for (name, folder), weight in zip(sets.items(), (5, 2, 1), strict=True)
        }
        data = WebDataModule(**{"mixture": sources, "num_workers": 0, "shuffle_buffer": 8, "resume": "exact"} | options)
        if state is not None:
            data.load_state_dict(json.loads(json.dumps(state)))
        found.append(data.attach(Words(), rank=rank, world_size=world))
    return found


def run(data: list[WebDataModule], steps: int) -> tuple[list[list[str]], Any]:
    """Take steps on all ranks; return the keys of each rank's batches and the state of all ranks together."""
    batches: list[list[str]] = []
    for part in data:
        loader = part.train_dataloader()
        own: list[str] = []
        while len(own) < steps:
            for batch in loader:
                own.append(",".join(batch["keys"]))
                if len(own) == steps:
                    break
        batches.append(own)
    states = [part.state_dict() for part in data]
    for part in data:
        part.teardown()
    seen = sum((Counter(state["samples_seen"]) for state in states), Counter())
    return batches, states[0] | {"ranks": [state["ranks"][0] for state in states], "samples_seen": dict(seen)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_ranks_resume_with_the_same_batches(sets, mode, num_workers):
    whole, _ = run(modules(sets, 2, **MODES[mode]), 30)
    first, state = run(modules(sets, 2, **MODES[mode], num_workers=num_workers), 11)
    second, state = run(modules(sets, 2, state, **MODES[mode], num_workers=1), 6)
    third, _ = run(modules(sets, 2, state, **MODES[mode], num_workers=2), 13)
    assert [a + b + c for a, b, c in zip(first, second, third, strict=True)] == whole


@pytest.mark.parametrize("mode", MODES)
def test_other_ranks_see_every_sample_of_the_stream_once(sets, mode):
    state, seen = None, Counter()
    for world, steps in ((2, 5), (1, 4), (4, 3), (3, 1), (1, 40)):
        batches, state = run(modules(sets, world, state, **MODES[mode]), steps)
        seen.update(key for rank in batches for batch in rank for key in batch.split(","))
    one, _ = run(modules(sets, 1, **MODES[mode]), 400)
    stream = [key for batch in one[0] for key in batch.split(",")]
    # The windows that are left hold the rest: all samples before the first untouched window are there, each as often.
    assert state["ranks"][0]["stride"] == 1
    done = state["ranks"][0]["next"] * state["window"]
    expected = Counter(stream[:done])
    left = {window for window, _ in state["ranks"][0]["pending"]}
    assert len(left) <= 1
    if not left:
        assert seen == expected
    else:
        assert not seen - expected
    assert sum(seen.values()) == sum(state["samples_seen"].values())


def test_a_plain_dataset_is_seen_once_an_epoch_over_changing_ranks(sets):
    options = {"mixture": None, "train": [sets["a"]], "batch_size": 1}
    state, seen = None, Counter()
    for world, steps in ((2, 10), (1, 5), (4, 9)):
        batches, state = run(modules(sets, world, state, **options), steps)
        seen.update(key for rank in batches for key in rank)
    assert seen == Counter({f"a-{number:08d}": 1 for number in range(61)})
    assert state["sources"] == {"train": {"epoch": 1, "position": 0}}
    assert state["samples_seen"] == {"a": 61}


def test_the_number_of_ranks_does_not_change_what_a_step_holds(sets):
    two, _ = run(modules(sets, 2, batch_size=2), 6)
    four, _ = run(modules(sets, 4, batch_size=2), 3)
    one, _ = run(modules(sets, 1, batch_size=2), 12)
    assert [batch for step in zip(*two, strict=True) for batch in step] == one[0]
    assert [batch for step in zip(*four, strict=True) for batch in step] == one[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"batch_size": 4}, "batch_size was 3, is 4"),
        ({"shuffle_buffer": 9}, "shuffle_buffer was 8, is 9"),
        ({"sources": ["a", "b", "c"]}, r"sets of a was .*sources all\), is .*sources \['a', 'b', 'c'\]"),
        ({"max_text_length": 5}, "max_text_length was None, is 5"),
        ({"token_budget": 20}, "token_budget was None, is 20"),
    ],
)
def test_other_data_or_settings_are_refused_with_the_difference(sets, change, message):
    _, state = run(modules(sets, 1, batch_size=3), 4)
    with pytest.raises(ConfigError, match=f"trained on other batches: .*{message}.*resume=coarse"):
        modules(sets, 1, state, **{"batch_size": 3} | change)[0].train_dataloader()


def test_another_tokenizer_or_manifest_is_refused(sets, tmp_path):
    _, state = run(modules(sets, 1), 4)
    (data,) = modules(sets, 1, state)
    other = Words()
    other.name = "letters"
    with pytest.raises(ConfigError, match=re.escape("processor.tokenizer was words, is letters")):
        data.attach(other).train_dataloader()
    grown = dict(sets, c=tmp_path / "c")
    with ShardWriter(grown["c"], name="c", source="c", license="none") as out:
        out.add({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}, [], [])
    with pytest.raises(ConfigError, match="sets of c was"):
        modules(grown, 1, state)[0].train_dataloader()


def test_a_coarse_resume_continues_at_the_same_share(sets, caplog):
    _, state = run(modules(sets, 1, batch_size=3), 14)  # 42 of 83 samples
    batches, after = run(modules(sets, 1, state, batch_size=5, resume="coarse"), 1)
    assert after["ranks"][0]["next"] == 42 // 5 + 1
    assert "batch_size was 3, is 5" in caplog.text
    assert len(batches[0]) == 1
