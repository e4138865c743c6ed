"""Supervised cross entropy: the sum over supervised positions, and nothing else meets the head."""

import pytest
import torch
from torch.nn import functional as F

from alignvlm_pl.errors import DataError
from alignvlm_pl.losses import supervised_cross_entropy


def test_equals_cross_entropy_of_all_positions():
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    head = torch.nn.Linear(4, 7, bias=False)
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100, -100, -100, -100, 1]])
    total, count = supervised_cross_entropy(hidden, labels, head)
    expected = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count.item() == 3  # the label of the first position is predicted by nobody
    gradients = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (total, expected)]
    torch.testing.assert_close(*gradients)


def test_only_supervised_positions_meet_the_head():
    seen = []
    head = torch.nn.Linear(4, 7)
    head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    supervised_cross_entropy(torch.randn(2, 5, 4), torch.tensor([[-100, 1, -100, -100, 2]] * 2), head)
    assert seen == [(4, 4)]


def test_sum_is_float32_of_bfloat16_logits():
    head = torch.nn.Linear(4, 7).bfloat16()
    total, count = supervised_cross_entropy(
        torch.randn(1, 3, 4).bfloat16(), torch.tensor([[-100, 1, 2]]), head
    )
    assert total.dtype == count.dtype == torch.float32


def test_nothing_supervised_is_an_error():
    with pytest.raises(DataError, match="no supervised token"):
        supervised_cross_entropy(torch.randn(1, 3, 4), torch.tensor([[5, -100, -100]]), torch.nn.Linear(4, 7))
