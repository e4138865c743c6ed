"""Connectors: one interface, and errors that name what was probably meant."""

import pytest
import torch

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.connectors import MLPConnector, build_connector

WIDTHS = {"vision_dim": 5, "text_dim": 6, "vocab_size": 11}


def test_types():
    assert type(build_connector({"type": "mlp"}, **WIDTHS)) is MLPConnector
    align = build_connector({"type": "align", "gain_init": 2.0, "vocab_rows": 4}, **WIDTHS)
    assert type(align) is AlignConnector
    assert (align.gain_init, align.rows) == (2.0, 4)
    assert type(build_connector({}, **WIDTHS)) is AlignConnector


def test_options_are_not_changed():
    options = {"type": "mlp", "layers": 1}
    build_connector(options, **WIDTHS)
    assert options == {"type": "mlp", "layers": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "aline"}, "type 'aline' is unknown: did you mean 'align'"),
        ({"type": "align", "gain_int": 2}, "'align' has no option 'gain_int': did you mean 'gain_init'"),
        ({"type": "mlp", "layer": 2}, "'mlp' has no option 'layer': did you mean 'layers'"),
        ({"type": "mlp", "text_dim": 2}, "no option 'text_dim'"),
        ({"type": "mlp", "layers": 3}, "layers=3"),
        ({"type": "mlp", "activation": "glu"}, "activation 'glu': did you mean 'gelu'"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ConfigError, match=message):
        build_connector(options, **WIDTHS)


def test_mlp_is_its_formula():
    features = torch.randn(2, 3, 5)
    table = torch.randn(11, 6)
    two = build_connector({"type": "mlp"}, **WIDTHS)
    first, last = two.layers[0], two.layers[2]
    inner = torch.nn.functional.gelu(features @ first.weight.T + first.bias)
    torch.testing.assert_close(two(features, table).embeds, inner @ last.weight.T + last.bias)
    one = build_connector({"type": "mlp", "layers": 1, "activation": "relu"}, **WIDTHS)
    expected = (features @ one.layers[0].weight.T + one.layers[0].bias).clamp(min=0)
    torch.testing.assert_close(one(features, table).embeds, expected)


def test_mlp_has_nothing_to_read():
    connector = build_connector({"type": "mlp"}, **WIDTHS)
    assert not connector.reads_text
    assert connector(torch.randn(1, 1, 5), torch.randn(11, 6)).log_probs is None
    with pytest.raises(ConfigError, match="no P_vocab"):
        connector(torch.randn(1, 1, 5), torch.randn(11, 6), columns=torch.tensor([0]))
