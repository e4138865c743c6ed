"""The baselines against straightforward NumPy in float64, and against transformers' and timm's own modules.

Worst differences measured, as shares of the largest value: 3e-15 against NumPy, 8e-16 against transformers' Idefics;
0 against its Ovis2 and timm 1.0.31. The tolerances leave room for other orders of summation.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alignvlm_pl.models.connectors import build_connector
from alignvlm_pl.models.connectors.c_abstractor import RegStage

WIDTHS = {"vision_dim": 6, "text_dim": 10, "vocab_size": 23}
TOLERANCE = {"rtol": 0, "atol": 1e-12}
GRID = (3, 5)


def random_connector(options, *, grid=GRID, widths=WIDTHS):
    """A connector none of whose weights is at its start, features, and its weights as arrays."""
    torch.manual_seed(0)
    connector = build_connector(options, **widths, grid=grid).double()
    for parameter in connector.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    features = torch.randn(2, grid[0] * grid[1], widths["vision_dim"], dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in connector.named_parameters()}
    return connector, features, weights


def embeds_of(connector, features):
    return connector(features, torch.zeros(0, 0)).embeds.detach().numpy()


# --- the parts, one vector at a time --------------------------------------------------------------


def norm(x, weights, name, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2 + eps) * weights[
        f"{name}.weight"
    ] + weights.get(f"{name}.bias", 0)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- Perceiver ------------------------------------------------------------------------------------


def perceiver_oracle(media, weights, *, depth, heads, head_dim):
    latents = weights["latents"]
    for layer in range(depth):
        own = {k.removeprefix(f"layers.{layer}."): v for k, v in weights.items()}
        seen, asked = norm(media, own, "norm_media"), norm(latents, own, "norm_latents")
        both = np.concatenate([seen, asked])
        query, pairs = linear(asked, own, "to_q"), linear(both, own, "to_kv")
        read = np.zeros_like(query)
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            keys, values = pairs[:, part], pairs[:, heads * head_dim :][:, part]
            for row in range(len(query)):
                shares = softmax(keys @ query[row, part] / math.sqrt(head_dim))
                read[row, part] = sum(share * value for share, value in zip(shares, values, strict=True))
        latents = latents + linear(read, own, "to_out")
        inside = linear(norm(latents, own, "feed_forward.0"), own, "feed_forward.1")
        latents = latents + linear(gelu(inside), own, "feed_forward.3")
    return norm(latents, weights, "norm")


PERCEIVER = {"type": "perceiver", "num_latents": 7, "depth": 3, "heads": 2, "head_dim": 5}


@pytest.mark.parametrize("projection", ["linear", "mlp2x_gelu"])
def test_perceiver_is_its_oracle(projection):
    connector, features, weights = random_connector({**PERCEIVER, "projection": projection})
    found = embeds_of(connector, features)
    assert found.shape == (2, 7, 10)
    for tile, embeds in zip(features.numpy(), found, strict=True):
        expected = linear(perceiver_oracle(tile, weights, depth=3, heads=2, head_dim=5), weights, "projection.0")
        if projection == "mlp2x_gelu":
            expected = linear(gelu(expected), weights, "projection.2")
        np.testing.assert_allclose(embeds, expected, rtol=1e-12, atol=1e-12)


def test_perceiver_is_idefics_with_its_weights():
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    connector, features, _ = random_connector(PERCEIVER)
    config = IdeficsConfig(vision_config={"embed_dim": 6}, perceiver_config={"qk_layer_norms_perceiver": False})
    other = IdeficsPerceiverResampler(config, embed_dim=6, depth=3, n_heads=2, head_dim=5, n_latents=7).double()
    other.latents.data.copy_(connector.latents.data)
    other.layer_norm.load_state_dict(connector.norm.state_dict())
    for (attention, inside), layer in zip(other.blocks, connector.layers, strict=True):
        keys, values = layer.to_kv.weight.chunk(2)
        state = {"q_proj.weight": layer.to_q.weight, "k_proj.weight": keys, "v_proj.weight": values}
        state["output_proj.weight"] = layer.to_out.weight
        state |= {f"context_layer_norm.{k}": v for k, v in layer.norm_media.state_dict().items()}
        state |= {f"latents_layer_norm.{k}": v for k, v in layer.norm_latents.state_dict().items()}
        attention.load_state_dict(state)
        norm_of, first, _, last = layer.feed_forward
        state = {"fc.weight": first.weight, "c_proj.weight": last.weight}
        inside.load_state_dict(state | {f"ln.{k}": v for k, v in norm_of.state_dict().items()})
        inside.act = nn.GELU()  # Idefics has a ReLU where Flamingo's published code has a GELU
    with torch.no_grad():
        expected = connector.projection(other(features))
    np.testing.assert_allclose(embeds_of(connector, features), expected, rtol=1e-12, atol=1e-12)


def test_perceiver_is_idefics2_but_for_its_norms_and_gate():
    """Attention, residuals and latents are Idefics2's own; its RMSNorm and gated MLP give way to Flamingo's."""
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    connector, features, _ = random_connector(PERCEIVER)
    config = Idefics2PerceiverConfig(
        hidden_size=6,
        resampler_n_latents=7,
        resampler_depth=3,
        resampler_n_heads=2,
        resampler_head_dim=5,
        num_key_value_heads=2,
    )
    other = Idefics2PerceiverResampler(config).double().eval()
    other.latents.data.copy_(connector.latents.data)
    other.norm = connector.norm
    for theirs, layer in zip(other.layers, connector.layers, strict=True):
        keys, values = layer.to_kv.weight.chunk(2)
        state = {"q_proj.weight": layer.to_q.weight, "k_proj.weight": keys, "v_proj.weight": values}
        theirs.self_attn.load_state_dict({**state, "o_proj.weight": layer.to_out.weight})
        theirs.input_context_norm, theirs.input_latents_norm = layer.norm_media, layer.norm_latents
        theirs.post_attention_layernorm, theirs.mlp = layer.feed_forward[0], layer.feed_forward[1:]
    with torch.no_grad():
        expected = connector.projection(other(features, attention_mask=torch.ones(2, 15)))
    np.testing.assert_allclose(embeds_of(connector, features), expected, rtol=1e-12, atol=1e-12)


# --- Ovis -----------------------------------------------------------------------------------------


def squares_oracle(tile, grid, side):
    """Join squares by walking over them; what lies outside the grid is zero."""
    rows, columns = grid
    joined = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            cells = [
                tile[row * columns + column] if row < rows and column < columns else np.zeros_like(tile[0])
                for row in range(top, top + side)
                for column in range(left, left + side)
            ]
            joined.append(np.concatenate(cells))
    return np.stack(joined)


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("tokenize", ["softmax", "argmax"])
@pytest.mark.parametrize("marks", [False, True])
def test_ovis_is_its_oracle(side, tokenize, marks):
    options = {"type": "ovis", "visual_vocab": 19, "hidden_stride": side, "tokenize": tokenize}
    connector, features, weights = random_connector({**options, "mark_tiles": marks})
    found = embeds_of(connector, features)
    for tile, embeds in zip(features.numpy(), found, strict=True):
        logits = norm(linear(squares_oracle(tile, GRID, side), weights, "head"), weights, "head_norm")
        assert logits.shape[1] == 14
        shares = softmax(logits) if tokenize == "softmax" else np.eye(14)[logits.argmax(-1)]
        padded = np.concatenate([shares, np.zeros((len(shares), 5))], axis=1)
        expected = padded @ weights["table.weight"]
        if marks:
            table = weights["table.weight"]
            expected = np.concatenate([table[14:15], expected, table[15:16]])
        np.testing.assert_allclose(embeds, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokenize", "theirs"), [("softmax", "softmax"), ("argmax", "st_argmax")])
@pytest.mark.parametrize(("side", "cells"), [(1, 3), (2, 4), (3, 6)])
def test_ovis_is_ovis2_with_its_weights(side, cells, tokenize, theirs):
    """On grids that the side divides: transformers fills up the tokens before it lays them out, mixing tiles."""
    from transformers import Ovis2VisionConfig
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel, Ovis2VisualEmbeddingTable

    class Given(nn.Module):
        def forward(self, pixel_values, **kwargs):
            return (pixel_values,)

    options = {"type": "ovis", "visual_vocab": 19, "hidden_stride": side, "tokenize": tokenize}
    connector, features, _ = random_connector(options, grid=(cells, cells))
    config = Ovis2VisionConfig(
        hidden_size=6,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=19,
        hidden_stride=side,
        num_visual_indicator_tokens=5,
        tokenize_function=theirs,
    )
    model = Ovis2VisionModel(config).double()
    model.transformer = Given()
    model.head_linear.load_state_dict(connector.head.state_dict())
    model.head_norm.load_state_dict(connector.head_norm.state_dict())
    table = Ovis2VisualEmbeddingTable(19, 10).double()
    table.load_state_dict(connector.table.state_dict())
    with torch.no_grad():
        shares = model(features).pooler_output
        expected = table(F.pad(shares, (0, 5)))
    np.testing.assert_allclose(embeds_of(connector, features), expected, rtol=1e-12, atol=1e-12)


def test_ovis_hard_words_have_the_gradient_of_the_softmax():
    gradients = []
    for tokenize in ("softmax", "argmax"):
        connector, features, _ = random_connector({"type": "ovis", "visual_vocab": 19, "tokenize": tokenize})
        target = torch.randn(2, 15, 10, dtype=torch.float64)
        (connector(features, None).embeds * target).sum().backward()
        gradients.append(connector.head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


def test_ovis_gumbel_draws_in_training_only():
    connector, features, _ = random_connector({"type": "ovis", "visual_vocab": 19, "tokenize": "gumbel"})
    table = connector.table.weight.detach()[:14]
    connector.train()
    drawn = [embeds_of(connector, features) for _ in range(3)]
    assert not np.array_equal(drawn[0], drawn[1])
    nearest = np.abs(drawn[0][:, :, None] - table.numpy()).max(-1).min(-1)
    assert nearest.max() < 1e-12, "every output is one row of the table"
    connector.eval()
    assert np.array_equal(embeds_of(connector, features), embeds_of(connector, features))


# --- H-Reducer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "end"), [((1, 4), True), ((1, 4), False), ((2, 2), True)])
def test_h_reducer_is_its_oracle(window, end):
    options = {"type": "h_reducer", "window": list(window), "end_token": end}
    connector, features, weights = random_connector(options)
    height, width = window
    rows, columns = -(-GRID[0] // height), -(-GRID[1] // width)
    found = embeds_of(connector, features)
    assert found.shape == (2, rows * columns + end, 10)
    for tile, embeds in zip(features.numpy(), found, strict=True):
        picture = np.zeros((rows * height, columns * width, 6))
        picture[: GRID[0], : GRID[1]] = tile.reshape(*GRID, 6)
        expected = []
        for top in range(0, rows * height, height):
            for left in range(0, columns * width, width):
                cells = picture[top : top + height, left : left + width]  # (height, width, 6)
                inside = gelu(np.einsum("oihw,hwi->o", weights["before.weight"], cells) + weights["before.bias"])
                mixed = inside.reshape(height, width, 6)
                token = np.einsum("oihw,hwi->o", weights["reducer.weight"], mixed) + weights["reducer.bias"]
                expected.append(linear(token, weights, "projection"))
        if end:
            expected.append(weights["end"][0])
        np.testing.assert_allclose(embeds, np.stack(expected), rtol=1e-11, atol=1e-11)


def test_h_reducer_sees_the_last_columns():
    connector, features, _ = random_connector({"type": "h_reducer"}, grid=(2, 27))
    moved = features.clone()
    moved[:, 26] += 1.0  # the last column of the first row
    changed = np.abs(embeds_of(connector, moved) - embeds_of(connector, features)).max((0, 2)) > 1e-6
    assert np.flatnonzero(changed).tolist() == [6]


# --- C-Abstractor ---------------------------------------------------------------------------------


def convolve(picture, kernel):
    """3 x 3 depthwise; picture (rows, columns, channels), kernel (channels, 1, 3, 3)."""
    rows, columns, _ = picture.shape
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros_like(picture)
    for row in range(rows):
        for column in range(columns):
            out[row, column] = np.einsum("hwc,chw->c", padded[row : row + 3, column : column + 3], kernel[:, 0])
    return out


def block_oracle(picture, weights, name):
    own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}

    def mix(x, layer):
        return norm(x @ own[f"{layer}.conv.weight"][:, :, 0, 0].T, own, f"{layer}.bn")

    def silu(x):
        return x * sigmoid(x)

    inside = silu(mix(picture, "conv1"))
    inside = silu(norm(convolve(inside, own["conv2.conv.weight"]), own, "conv2.bn"))
    mean = inside.mean((0, 1))
    gate = silu(own["se.fc1.weight"][:, :, 0, 0] @ mean + own["se.fc1.bias"])
    inside = inside * sigmoid(own["se.fc2.weight"][:, :, 0, 0] @ gate + own["se.fc2.bias"])
    shortcut = mix(picture, "downsample") if "downsample.conv.weight" in own else picture
    return silu(mix(inside, "conv3") + shortcut)


def pool_oracle(picture, cells):
    rows, columns, _ = picture.shape
    out = np.zeros((*cells, picture.shape[2]))
    for row in range(cells[0]):
        for column in range(cells[1]):
            top, bottom = row * rows // cells[0], -(-(row + 1) * rows // cells[0])
            left, right = column * columns // cells[1], -(-(column + 1) * columns // cells[1])
            out[row, column] = picture[top:bottom, left:right].mean((0, 1))
    return out


@pytest.mark.parametrize("hidden", [6, 8])
def test_c_abstractor_is_its_oracle(hidden):
    options = {"type": "c_abstractor", "hidden": hidden, "depth": 2, "pool": [2, 3]}
    connector, features, weights = random_connector(options)
    found = embeds_of(connector, features)
    for tile, embeds in zip(features.numpy(), found, strict=True):
        picture = (tile + weights["position"]).reshape(*GRID, 6)
        for name in ("before.b1", "before.b2", "pool", "behind.b1", "behind.b2"):
            picture = pool_oracle(picture, (2, 3)) if name == "pool" else block_oracle(picture, weights, name)
        first = linear(picture.reshape(6, hidden), weights, "readout.0")
        expected = linear(first * sigmoid(first), weights, "readout.2")
        np.testing.assert_allclose(embeds, expected, rtol=1e-11, atol=1e-11)


def wave(shape, phase):
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * 0.7 + phase).reshape(shape)


def waving_stage(stage):
    for phase, parameter in enumerate(stage.double().parameters()):
        parameter.data = wave(parameter.shape, phase)
    with torch.no_grad():
        return stage(wave((1, 6, 3, 4), 0.5))[0]


def test_regstage_gives_what_timm_gave():
    """Numbers of timm 1.0.31: RegStage(2, 6, 8, stride=1, dilation=1, act_layer=SiLU, norm_layer=LayerNorm2d)."""
    found = waving_stage(RegStage(2, 6, 8))
    first = [1.654938604839992, -0.10699760969544933, -0.21839415815969038, -0.17077327690276578]
    first += [0.5834552309851858, 0.3607928484599542, 0.3637890785981187, 1.0626516372333856]
    last = [0.026035921946672157, -0.27719755954215397, -0.14742890894730704, -0.19297265239340755]
    last += [-0.1191637013831981, -0.24458302662754172, 0.2460466008343958, 1.2168078247511784]
    np.testing.assert_allclose(found[:, 0, 0], first, **TOLERANCE)
    np.testing.assert_allclose(found[:, 2, 3], last, **TOLERANCE)
    assert float(found.sum()) == pytest.approx(25.948451086606973, abs=1e-11)


def test_regstage_is_timms_where_timm_can_be_imported():
    try:
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage as TimmStage
    except (
        ImportError,
        RuntimeError,
    ) as error:  # its torchvision raises a RuntimeError beside a CPU build of torch
        pytest.skip(f"timm cannot be imported: {error}")
    settings = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
    theirs = TimmStage(2, 6, 8, **settings)
    assert theirs.state_dict().keys() == RegStage(2, 6, 8).state_dict().keys()
    torch.testing.assert_close(waving_stage(RegStage(2, 6, 8)), waving_stage(theirs), **TOLERANCE)


# --- linear combinations of text embeddings -------------------------------------------------------


@pytest.mark.parametrize("rows", [{}, {"vocab_rows": 9}, {"vocab_keep": [2, 3, 19]}], ids=str)
def test_langbridge_is_its_formula(rows):
    connector, features, weights = random_connector({"type": "langbridge", "width": 7, **rows})
    table = torch.randn(23, 10, dtype=torch.float64)
    hidden = gelu(linear(features.numpy(), weights, "layers.0"))
    hidden = linear(hidden, weights, "layers.2")
    kept = table[list(connector.row_ids())].numpy()
    expected = linear(hidden, weights, "layers.3") @ kept
    np.testing.assert_allclose(connector(features, table).embeds.detach().numpy(), expected, **TOLERANCE)


@pytest.mark.parametrize("rows", [{}, {"vocab_rows": 9}, {"vocab_keep": [2, 3, 19]}], ids=str)
def test_align_plain_is_align_before_its_softmax(rows):
    connector, features, weights = random_connector({"type": "align_plain", **rows})
    table = torch.randn(23, 10, dtype=torch.float64)
    hidden = norm(linear(features.numpy(), weights, "w1"), weights, "norm1")
    kept = table[list(connector.row_ids())].numpy()
    scores = norm(linear(hidden, weights, "w2"), weights, "norm2")
    np.testing.assert_allclose(connector(features, table).embeds.detach().numpy(), scores @ kept, **TOLERANCE)
    align, _, _ = random_connector({"type": "align", **rows})
    align.load_state_dict(connector.state_dict())
    expected = softmax(scores) @ kept
    np.testing.assert_allclose(align(features, table).embeds.detach().numpy(), expected, **TOLERANCE)


def test_the_mlp_with_a_norm_is_its_formula():
    connector, features, weights = random_connector({"type": "mlp", "norm": True})
    expected = norm(linear(gelu(linear(features.numpy(), weights, "layers.0")), weights, "layers.2"), weights, "norm")
    np.testing.assert_allclose(embeds_of(connector, features), expected, **TOLERANCE)
