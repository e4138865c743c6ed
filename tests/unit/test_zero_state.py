"""AdamW's state as ZeRO-2 keeps it: parameters laid end to end, one half a rank; written and read by parameter."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alignvlm_pl.strategies.sharded_checkpoint import Pieces
from alignvlm_pl.strategies.zero_state import ZeroState

SHAPES = ((2, 2), (3,), (3,))
"""Ten values of one group: the second parameter is cut."""


def rank_state(rank: int, *, trained: bool) -> ZeroState:
    """One of two ranks; the values are their own places in the whole, moments are their negatives."""
    begin = 5 * rank
    flat = torch.arange(begin, begin + 5.0) if trained else torch.zeros(5)
    parameters, offset = [], 0
    for shape in SHAPES:
        parameter = nn.Parameter(torch.zeros(shape))
        start, stop = max(offset, begin), min(offset + parameter.numel(), begin + 5)
        place = SimpleNamespace(start=start - begin, numel=stop - start)
        parameter._hp_mapping = None
        if start < stop:
            parameter._hp_mapping = SimpleNamespace(
                get_hp_fragment_address=lambda place=place: place,
                lp_fragment_address=SimpleNamespace(start=start - offset),
            )
        offset += parameter.numel()
        parameters.append(parameter)
    group = {"name": "llm/decay", "lr": 0.5 if trained else 0.1, "params": [flat]}
    kept = {flat: {"step": torch.tensor(3.0), "exp_avg": -flat}} if trained else {flat: {}}
    adam = SimpleNamespace(param_groups=[group], state=kept)
    optimizer = SimpleNamespace(optimizer=adam, single_partition_of_fp32_groups=[flat], device="cpu")
    return ZeroState(optimizer, [parameters])


@pytest.fixture
def stored():
    """What both ranks write, as it is read again."""
    ranks = [rank_state(rank, trained=True).state_dict() for rank in range(2)]
    state = {
        index: {
            "step": ranks[0]["state"][index]["step"],
            "exp_avg": Pieces([rank["state"][index]["exp_avg"].values for rank in ranks], SHAPES[index]),
        }
        for index in range(3)
    }
    return {"state": state, "param_groups": ranks[0]["param_groups"]}


def test_it_is_written_by_parameter(stored):
    moments = [stored["state"][index]["exp_avg"].whole().flatten() for index in range(3)]
    assert torch.cat(moments).tolist() == [-float(value) for value in range(10)]
    assert stored["param_groups"] == [{"name": "llm/decay", "lr": 0.5, "params": [0, 1, 2]}]
    # `torch.optim.AdamW` counts each parameter's steps in place.
    assert len({kept["step"].data_ptr() for kept in stored["state"].values()}) == 3


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_part_of_whole_tensors_or_pieces(stored, rank, whole):
    if whole:
        for kept in stored["state"].values():
            kept["exp_avg"] = kept["exp_avg"].whole()
    found, expected = (rank_state(rank, trained=trained) for trained in (False, True))
    found.load_state_dict(stored)
    new, old = found.optimizer.optimizer, expected.optimizer.optimizer
    [mine], [wanted] = new.state.values(), old.state.values()
    assert torch.equal(mine["exp_avg"], wanted["exp_avg"])
    assert mine["step"] == 3.0
    assert new.param_groups[0]["lr"] == 0.5
    assert new.param_groups[0]["params"] == found.optimizer.single_partition_of_fp32_groups


def test_a_rank_takes_its_part_of_the_weights():
    state = rank_state(1, trained=False)
    for parameter, values in zip(state.groups[0], torch.arange(10.0).split([4, 3, 3]), strict=True):
        state.set_weights(parameter, values.view(parameter.shape))
    assert state.optimizer.single_partition_of_fp32_groups[0].tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]
    first = state.weights(state.groups[0][0])
    assert (first.values.numel(), first.shape) == (0, (2, 2))
