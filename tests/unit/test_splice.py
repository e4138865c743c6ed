"""Splicing visual vectors in, or refusing with both counts."""

import pytest
import torch

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.sequences import splice


def batch():
    embeds = torch.zeros(2, 5, 3, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool()
    visual = torch.arange(18.0).reshape(3, 2, 3).requires_grad_()
    return embeds, mask, visual


def test_vectors_land_in_reading_order():
    embeds, mask, visual = batch()
    out = splice(embeds, mask, visual, torch.tensor([1, 2]))
    torch.testing.assert_close(out[mask], visual.reshape(-1, 3))
    assert bool((out[~mask] == 0).all())
    out.sum().backward()
    assert bool((visual.grad == 1).all())
    torch.testing.assert_close(embeds.grad, (~mask).float().unsqueeze(-1).expand(2, 5, 3))


def test_dtype_is_that_of_the_embeddings():
    embeds, mask, visual = batch()
    assert splice(embeds.bfloat16(), mask, visual).dtype == torch.bfloat16


def test_a_sample_with_the_wrong_count_is_named():
    embeds, mask, visual = batch()
    with pytest.raises(DataError, match="sample 0 of the batch has 2 image placeholders but its 2 tiles give 4"):
        splice(embeds, mask, visual, torch.tensor([2, 1]))


def test_totals_are_checked_without_num_tiles():
    embeds, mask, visual = batch()
    with pytest.raises(DataError, match="6 image placeholders but 2 tiles give 4 visual tokens"):
        splice(embeds, mask, visual[:2])
    # Per sample all is well, but a tile more came than is announced.
    with pytest.raises(DataError, match="6 image placeholders but 4 tiles give 8 visual tokens"):
        splice(embeds, mask, torch.zeros(4, 2, 3), torch.tensor([1, 2]))


def test_num_tiles_of_another_batch():
    embeds, mask, visual = batch()
    with pytest.raises(DataError, match="num_tiles has 1 entries but the batch has 2"):
        splice(embeds, mask, visual, torch.tensor([1]))
