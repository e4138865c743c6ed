"""Sharpness and likeness of a connector's tokens, by hand; the gain that reaches an entropy."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models import token_spread as spread
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.connectors import build_connector

WIDTHS = {"vision_dim": 5, "text_dim": 6, "vocab_size": 11}


def align(gain: float = 1.0) -> AlignConnector:
    torch.manual_seed(0)
    connector = AlignConnector(**WIDTHS, gain_init=gain)
    connector.initialize(torch.randn(11, 6))
    with torch.no_grad():
        connector.norm2.bias.normal_(std=0.1)
    return connector


def test_mean_cosine_of_three_tokens_by_hand():
    # Pairs: 90, 45 and 45 degrees. The lengths do not count.
    outputs = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert spread.mean_cosine(outputs) == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3, abs=1e-6)
    assert spread.mean_cosine(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(-1)


class Given(nn.Module):
    """A connector whose scores are its features: the vocabulary norm is taken away."""

    reads_text = True

    def forward(self, features, table, *, columns=None):
        return SimpleNamespace(embeds=features.softmax(dim=-1) @ table)


def test_entropy_and_largest_weight_by_hand(monkeypatch):
    monkeypatch.setattr(spread, "vocabulary_scores", lambda connector, features, limit: features.flatten(0, 1))
    # Weights 1/2, 1/4, 1/4 and 1, 0, 0: entropies 1.5 ln 2 and 0.
    features = torch.tensor([[[0.5, 0.25, 0.25]], [[1.0, 0.0, 0.0]]]).log()
    found = spread.token_spread(Given(), features, torch.eye(3), limit=10)
    assert found.tokens == found.paired == 2
    metrics = found.metrics(reads_text=True)
    assert metrics["entropy"] == pytest.approx(0.75 * math.log(2))
    assert metrics["effective_vocabulary"] == pytest.approx(2**0.75)
    assert metrics["max_weight"] == pytest.approx(0.75)
    cosine = 0.5 / math.sqrt(0.25 + 2 / 16)
    assert metrics["token_cosine"] == pytest.approx(cosine)


def test_scores_are_those_of_the_connector(monkeypatch):
    connector, features = align(3.0), torch.randn(2, 4, 5)
    monkeypatch.setattr(spread, "CHUNK_TOKENS", 3)
    log_weights = spread.vocabulary_scores(connector, features, limit=100).log_softmax(dim=-1)
    expected = connector.log_probs(features, torch.arange(11)).flatten(0, 1).detach()
    torch.testing.assert_close(log_weights, expected)
    table = torch.randn(11, 6)
    found = spread.token_spread(connector, features, table, limit=100).metrics(reads_text=True)
    entropies = -(expected.exp() * expected).sum(dim=1)
    assert found["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)
    assert found["max_weight"] == pytest.approx(float(expected.exp().amax(1).mean()), rel=1e-5)
    outputs = connector(features, table).embeds.flatten(0, 1).detach()
    cosines = nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1)
    assert found["token_cosine"] == pytest.approx(float((cosines.sum() - 8) / 56), abs=1e-5)


def test_a_connector_without_p_vocab_has_the_cosine_only():
    connector = build_connector({"type": "mlp"}, **WIDTHS)
    found = spread.token_spread(connector, torch.randn(1, 4, 5), torch.randn(11, 6), limit=3)
    assert found.tokens == 3
    assert set(found.metrics(reads_text=False)) == {"token_cosine"}


def test_nothing_and_a_single_token_have_no_mean_of_pairs():
    nothing = spread.token_spread(align(), torch.zeros(0, 4, 5), torch.randn(11, 6), limit=9)
    assert nothing.metrics(reads_text=True) == {}
    single = spread.token_spread(align(), torch.randn(1, 1, 5), torch.randn(11, 6), limit=9)
    assert set(single.metrics(reads_text=True)) == {"entropy", "effective_vocabulary", "max_weight"}


@pytest.mark.parametrize("tiles", [0, 1, 7])
def test_features_are_of_evenly_spaced_tiles_and_the_tower_always_runs(tiles):
    seen = []

    class Net:
        config = SimpleNamespace(tokens_per_tile=4)

        def encode_images(self, pixel_values):
            seen.append(pixel_values[:, 0, 0, 0].tolist())
            return torch.zeros(len(pixel_values), 4, 5)

    pixels = torch.arange(1.0, tiles + 1)[:, None, None, None].expand(tiles, 3, 2, 2)
    features = spread.visual_features(Net(), pixels, limit=10)  # three tiles of four tokens
    assert seen == [{0: [0], 1: [1], 7: [1, 4, 7]}[tiles]]
    assert len(features) == min(tiles, 3)


@pytest.mark.parametrize("target", [0.2, 1.0, 2.2])
def test_the_factor_reaches_the_entropy_once_it_is_in_the_gain(target):
    connector, features = align(1.7), torch.randn(3, 7, 5)
    scores = spread.vocabulary_scores(connector, features, limit=100)
    factor, output = spread.gain_factor(scores, connector.norm2.bias, target=target)
    assert output == pytest.approx(target, abs=spread.TOLERANCE)
    with torch.no_grad():
        connector.norm2.weight.mul_(factor)
    log_weights = connector.log_probs(features, torch.arange(11))
    entropy = -(log_weights.exp() * log_weights).sum(dim=-1).mean().detach()
    assert float(entropy) == pytest.approx(target, abs=2 * spread.TOLERANCE)


def test_a_target_out_of_reach_names_the_range():
    connector = align()
    with torch.no_grad():
        connector.norm2.bias[0] = 50.0  # one row takes all, whatever the gain below some size
    scores = spread.vocabulary_scores(connector, torch.randn(1, 4, 5), limit=100)
    with pytest.raises(
        ConfigError, match=r"target_entropy=2: .* reaches 0\.000 to 0\.0\d+ nats on this batch \(11 rows"
    ):
        spread.gain_factor(scores, connector.norm2.bias, target=2.0)
    dead = torch.zeros(4, 11)
    with pytest.raises(ConfigError, match=r"reaches 2\.398 to 2\.398 nats"):
        spread.gain_factor(dead, torch.zeros(11), target=1.0)
