"""Supervised cross entropy: the sum over supervised positions, and nothing else meets the head."""

import torch
from torch.nn import functional as F

from alignvlm_pl.models.losses import supervised_cross_entropy


def test_equals_cross_entropy_of_all_positions():
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    head = torch.nn.Linear(4, 7, bias=False)
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100, -100, -100, -100, 1]])
    total, count, sums, counts, _ = supervised_cross_entropy(hidden, labels, head)
    expected = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count.item() == 3  # the label of the first position is predicted by nobody
    every = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(sums, every.sum(dim=1).detach())
    assert counts.tolist() == [2, 1]
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
    found = supervised_cross_entropy(torch.randn(1, 3, 4).bfloat16(), torch.tensor([[-100, 1, 2]]), head)
    assert {value.dtype for value in found[:4]} == {torch.float32}


def test_packed_documents_have_their_own_sums():
    hidden, head = torch.randn(2, 6, 4), torch.nn.Linear(4, 7)
    labels = torch.tensor([[-100, 1, 2, -100, 3, -100], [-100, -100, -100, -100, 5, -100]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    found = supervised_cross_entropy(hidden, labels, head, segment_ids=segments)
    losses = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").detach()
    expected = [losses[0, :2].sum(), losses[0, 3], 0.0, 0.0, losses[1, 3]]
    torch.testing.assert_close(found.document_sums, torch.tensor(expected))
    assert found.document_supervised.tolist() == [2, 1, 0, 0, 1]
    torch.testing.assert_close(found.total, losses.sum())


def test_nothing_supervised_is_a_loss_of_zero_with_gradients_of_zero():
    hidden, head = torch.randn(1, 3, 4, requires_grad=True), torch.nn.Linear(4, 7)
    found = supervised_cross_entropy(hidden, torch.tensor([[5, -100, -100]]), head)
    assert [value.tolist() for value in found[:4]] == [0, 0, [0], [0]]
    found.total.backward()
    for tensor in (hidden, head.weight, head.bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
