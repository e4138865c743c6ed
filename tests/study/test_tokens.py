"""Lenses and principal components of the study `tokens`, on cases that are known."""

import numpy as np
import pytest
import torch

from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.models.token_lens import connector_outputs, has_grid, read_lens
from alignvlm_pl.models.token_readout import PlacedToken
from alignvlm_pl.study.tokens import _components, lens_hits


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    spec = tiny_spec(tmp_path_factory.mktemp("tokenizer"), connector={"type": "align"})
    return build_model(spec, build_processor(spec)).eval()


def test_the_embedding_lens_finds_the_embedding(net):
    ids = torch.tensor([[5, 200, 17, 42]])
    found = read_lens(net, 3 * net.get_input_embeddings().weight.detach()[ids], "embedding")
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.probabilities, torch.ones(1, 4))
    torch.testing.assert_close(found.entropy, torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_the_logit_lens_is_norm_and_head(net):
    outputs = torch.randn(2, 70, 64)  # more than a chunk
    norm = net.language_model.get_decoder().norm
    with torch.no_grad():
        weights = net.get_output_embeddings()(norm(outputs)).softmax(-1)
    found = read_lens(net, outputs, "logit")
    assert torch.equal(found.ids, weights.argmax(-1))
    torch.testing.assert_close(found.probabilities, weights.amax(-1))
    torch.testing.assert_close(found.entropy, -(weights * weights.log()).sum(-1))


def test_outputs_are_the_connectors(net):
    assert has_grid(net)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = net.connector(net.encode_images(pixels), net.get_input_embeddings().weight).embeds
    torch.testing.assert_close(connector_outputs(net, pixels), expected)


def test_a_token_is_right_where_its_text_is_part_of_the_line_below_it():
    def token(x, y, text):
        return PlacedToken((x, y, x + 8, y + 32), text, 1.0, 0.0, True, False, False)

    lines = [{"text": "AB12", "box": [0, 2, 40, 30]}]
    placed = [token(0, 0, "a"), token(8, 0, "x"), token(16, 0, " "), token(24, 0, " 12"), token(200, 0, "a")]
    assert lens_hits(placed, lines) == (2, 4)


def test_components_are_those_of_the_text_embeddings(net):
    found = _components(net, torch.randn(9, 64))
    table = net.get_input_embeddings().weight.detach()
    centred = (table - table.mean(0)).double().numpy()
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred[: len(found["text"])] @ axes[:2].T
    for column in range(2):
        own = np.asarray(found["text"])[:, column]
        assert abs(np.corrcoef(own, expected[:, column])[0, 1]) == pytest.approx(1, abs=0.02)
    assert len(found["visual"]) == 9
