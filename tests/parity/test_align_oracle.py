"""ALIGN against a float64 numpy re-statement of the paper's equations 1 to 3, outputs and gradients."""

import numpy as np
import pytest
import torch

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.sequences import splice
from alignvlm_pl.models.tiny import tiny_spec

TILES, TOKENS, VISION, TEXT, VOCAB = 2, 3, 5, 6, 11
EPS = 1e-5


def random_connector(**options):
    torch.manual_seed(3)
    connector = AlignConnector(VISION, TEXT, VOCAB, **options).double()
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    features = torch.randn(TILES, TOKENS, VISION, dtype=torch.float64)
    table = torch.randn(VOCAB, TEXT, dtype=torch.float64, requires_grad=True)
    return connector, features, table


def layer_norm(x, gain, shift):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return gain * (x - mean) / np.sqrt(variance + EPS) + shift


def oracle_weights(p, features):
    """Equation 1."""
    inner = layer_norm(features @ p["w1.weight"].T + p.get("w1.bias", 0.0), p["norm1.weight"], p["norm1.bias"])
    scores = layer_norm(inner @ p["w2.weight"].T, p["norm2.weight"], p["norm2.bias"])
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def oracle_embeds(p, features, table):
    """Equation 2."""
    weights = oracle_weights(p, features)
    return weights @ table[: weights.shape[-1]]


def as_numpy(connector):
    return {name: value.detach().numpy().copy() for name, value in connector.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"vocab_rows": 7}])
def test_outputs(options):
    connector, features, table = random_connector(**options)
    columns = torch.tensor([4, 0, 6])
    output = connector(features, table, columns=columns)
    p = as_numpy(connector)
    weights = oracle_weights(p, features.numpy())
    # Both are float64; measured worst case 4e-15.
    np.testing.assert_allclose(
        output.embeds.detach().numpy(),
        oracle_embeds(p, features.numpy(), table.detach().numpy()),
        rtol=0,
        atol=1e-12,
    )
    expected = np.log(weights[..., columns.numpy()])
    np.testing.assert_allclose(output.log_probs.detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(connector.log_probs(features, columns).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"vocab_rows": 7}])
def test_gradients_of_every_parameter_and_of_the_embedding_table(options):
    connector, features, table = random_connector(**options)
    target = torch.randn(TILES, TOKENS, TEXT, dtype=torch.float64)
    (connector(features, table).embeds * target).sum().backward()
    values = {**as_numpy(connector), "table": table.detach().numpy().copy()}
    found = {**dict(connector.named_parameters()), "table": table}

    def loss():
        return (oracle_embeds(values, features.numpy(), values["table"]) * target.numpy()).sum()

    for name, value in values.items():
        expected = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            ends = []
            for sign in (1, -1):
                value[index] = kept + sign * 1e-5
                ends.append(loss())
            value[index] = kept
            expected[index] = (ends[0] - ends[1]) / 2e-5
        # Central differences at 1e-5: truncation and rounding stay below 1e-8; measured worst case 2e-9.
        np.testing.assert_allclose(found[name].grad.numpy(), expected, rtol=0, atol=1e-7, err_msg=name)
        assert np.abs(expected).max() > 1e-4, name


def test_output_is_a_convex_combination_of_text_embeddings():
    connector, features, table = random_connector()
    connector.requires_grad_(False)
    # With the identity as the table the output is the weights themselves.
    weights = connector(features, torch.eye(VOCAB, dtype=torch.float64)).embeds
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(TILES, TOKENS, dtype=torch.float64))
    table = table.detach()
    embeds = connector(features, table).embeds
    assert bool((embeds >= table.min(0).values - 1e-12).all())
    assert bool((embeds <= table.max(0).values + 1e-12).all())


def test_equation_3_puts_visual_vectors_before_the_text():
    connector, features, table = random_connector()
    text = torch.randn(1, 4, TEXT, dtype=torch.float64)
    count = TILES * TOKENS
    mask = torch.tensor([[True] * count + [False] * 4])
    embeds = torch.cat([torch.zeros(1, count, TEXT, dtype=torch.float64), text], dim=1)
    visual = connector(features, table).embeds
    expected = torch.cat([visual.reshape(1, count, TEXT), text], dim=1)
    torch.testing.assert_close(splice(embeds, mask, visual, torch.tensor([TILES])), expected, rtol=0, atol=0)


def test_vocab_rows_use_the_first_rows_only():
    connector, features, table = random_connector(vocab_rows=7)
    connector(features, table).embeds.square().sum().backward()
    assert connector.w2.weight.shape == (7, TEXT)
    assert bool((table.grad[7:] == 0).all())
    assert bool((table.grad[:7] != 0).any())
    with pytest.raises(ConfigError, match=r"token id 9 .*vocab_rows \(7 of 11 rows\)"):
        connector(features, table, columns=torch.tensor([1, 9]))
    with pytest.raises(ConfigError, match="vocab_rows=12: expected 1 to 11"):
        AlignConnector(VISION, TEXT, VOCAB, vocab_rows=12)


def test_initialize():
    connector = AlignConnector(VISION, TEXT, VOCAB, gain_init=4.0, vocab_rows=7)
    head = torch.randn(VOCAB, TEXT)
    connector.initialize(head)
    torch.testing.assert_close(connector.w2.weight.data, head[:7], rtol=0, atol=0)
    assert bool((connector.norm2.weight == 4).all())
    assert connector.w2.bias is None
    with pytest.raises(ConfigError, match=r"shape \(11, 6\).*has \(11, 5\)"):
        connector.initialize(torch.zeros(VOCAB, 5))


def test_half_precision_keeps_the_softmax_in_float32():
    connector, features, table = random_connector()
    exact = connector(features, table, columns=torch.arange(VOCAB))
    half = connector.bfloat16()(features.bfloat16(), table.bfloat16(), columns=torch.arange(VOCAB))
    assert half.embeds.dtype == torch.bfloat16
    assert half.log_probs.dtype == torch.float32
    torch.testing.assert_close(half.log_probs.exp().sum(-1), torch.ones(TILES, TOKENS), rtol=0, atol=1e-5)
    # bfloat16 has 8 bits; scores are of order 1. Measured worst case 0.06.
    torch.testing.assert_close(half.embeds.double(), exact.embeds, rtol=0, atol=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_w2_is_a_copy_of_the_head_and_the_table_is_live(tmp_path, tied):
    spec = tiny_spec(tmp_path, tied=tied)
    model = build_model(spec, build_processor(spec))
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (table is head) == tied
    torch.testing.assert_close(model.connector.w2.weight, head, rtol=0, atol=0)
    before = table.detach().clone()
    optimizer = torch.optim.SGD([model.connector.w2.weight], lr=1.0)
    features = torch.randn(1, 4, 32)
    model.connector(features, table).embeds.square().sum().backward()
    assert bool(table.grad.abs().sum() > 0)  # E_text learns through equation 2
    optimizer.step()
    torch.testing.assert_close(table, before, rtol=0, atol=0)
    assert not torch.equal(model.connector.w2.weight, head)
