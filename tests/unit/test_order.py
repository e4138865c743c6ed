"""Position -> sample: every sample once an epoch, mixed, in exact shares, and the same on every machine."""

import pickle
from collections import Counter
from itertools import pairwise

import pytest

from alignvlm_pl.errors import ConfigError
from datamodules.stream.stream import BLOCK, SLOTS, DatasetOrder, Mixture

SIZES = (4, 150, 1, 70, 0, 33)

# Written down once: another order would make runs with the same seed incomparable.
GOLDEN_ORDER = [(2, 1), (0, 2), (1, 2), (1, 1), (1, 0), (2, 0), (1, 4), (1, 3), (0, 1), (0, 0)]
GOLDEN_MIX = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0]


def places(order: DatasetOrder, epoch: int = 0) -> list[tuple[int, int]]:
    return [order.locate(position) for position in range(epoch * len(order), (epoch + 1) * len(order))]


@pytest.mark.parametrize("buffer", [0, 1, 2, 64, 200, 10_000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_each_sample_once_an_epoch(buffer, epoch):
    found = Counter(places(DatasetOrder(SIZES, seed="7", buffer=buffer), epoch))
    assert found == Counter((shard, number) for shard, size in enumerate(SIZES) for number in range(size))


def test_the_order_is_a_function_of_seed_and_epoch():
    first = places(DatasetOrder(SIZES, seed="7", buffer=128))
    assert places(DatasetOrder(SIZES, seed="7", buffer=128)) == first
    assert places(DatasetOrder(SIZES, seed="8", buffer=128)) != first
    assert places(DatasetOrder(SIZES, seed="7", buffer=128), epoch=1) != first


def test_any_position_can_be_asked_for_in_any_order():
    order = DatasetOrder(SIZES, seed="7", buffer=64)
    forward = [order.locate(position) for position in range(600)]
    backward = [order.locate(position) for position in reversed(range(600))]
    assert backward[::-1] == forward
    assert pickle.loads(pickle.dumps(order)).locate(431) == forward[431]


def test_the_order_is_the_same_on_every_machine():
    assert places(DatasetOrder((3, 5, 2), seed="golden", buffer=64)) == GOLDEN_ORDER
    assert [Mixture([2, 1], seed="golden").locate(position)[0] for position in range(30)] == GOLDEN_MIX


def test_the_buffer_mixes_shards_and_without_it_they_stay_in_order():
    plain = places(DatasetOrder([50] * 8, seed="7", buffer=0))
    assert sum(a[0] != b[0] for a, b in pairwise(plain)) == 7
    assert all(b[1] == a[1] + 1 for a, b in pairwise(plain) if a[0] == b[0])
    mixed = places(DatasetOrder([50] * 8, seed="7", buffer=8 * BLOCK))
    assert sum(a[0] != b[0] for a, b in pairwise(mixed)) > 300


def test_only_some_blocks_are_open_at_a_time():
    order = DatasetOrder([1000] * 50, seed="7", buffer=4 * BLOCK)
    for start in (0, 4 * BLOCK * 100):
        blocks = {(shard, number // BLOCK) for shard, number in map(order.locate, range(start, start + 4 * BLOCK))}
        assert len(blocks) <= 9  # two groups and a bit: the last block of a shard is shorter


@pytest.mark.parametrize("weights", [(5, 1), (1, 1, 1), (0.7, 0.2, 0.1), (1000, 1)])
def test_a_mixture_keeps_its_shares_and_gives_each_source_in_order(weights):
    mixture = Mixture(weights, seed="3")
    found = [mixture.locate(position) for position in range(5 * SLOTS)]
    for source, weight in enumerate(weights):
        own = [inner for number, inner in found if number == source]
        assert own == list(range(len(own)))
        assert len(own) == pytest.approx(5 * SLOTS * weight / sum(weights), abs=1.01)
        for start in range(0, 5 * SLOTS, SLOTS):
            part = sum(number == source for number, _ in found[start : start + SLOTS])
            assert part == pytest.approx(SLOTS * weight / sum(weights), abs=2.01)


def test_the_position_of_a_source_follows_from_that_of_the_mixture():
    mixture = Mixture([3, 2, 1], seed="3")
    for position in (0, 1, 777, SLOTS, 3 * SLOTS + 5):
        counts = Counter(mixture.locate(earlier)[0] for earlier in range(position))
        assert mixture.positions(position) == [counts[source] for source in range(3)]


def test_weights_that_cannot_be_kept_are_refused():
    for weights in ([1, 0], [1, -1], [1, 1e-6], [float("nan"), 1]):
        with pytest.raises(ConfigError, match=r"mixture: weights .*1024th of their sum"):
            Mixture(weights, seed="3")
