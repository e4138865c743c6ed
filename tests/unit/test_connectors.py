"""Connectors: one interface, and errors that name what was probably meant and both numbers."""

import pytest
import torch

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.connectors import CONNECTORS, build_connector
from alignvlm_pl.models.connectors.grid import pixel_shuffle
from alignvlm_pl.models.connectors.mlp import MLPConnector

WIDTHS = {"vision_dim": 5, "text_dim": 6, "vocab_size": 11}
SMALL = {
    "align": {},
    "mlp": {},
    "perceiver": {"depth": 2, "heads": 2, "head_dim": 4, "num_latents": 3},
    "ovis": {"visual_vocab": 17},
    "h_reducer": {"end_token": True},
    "c_abstractor": {"hidden": 8, "depth": 2, "pool": [2, 3]},
    "align_plain": {"vocab_rows": 9},
    "langbridge": {"vocab_keep": [1, 2, 7]},
}
BASELINES = [name for name in SMALL if name != "align"]


def test_types():
    assert type(build_connector({"type": "mlp"}, **WIDTHS)) is MLPConnector
    align = build_connector({"type": "align", "gain_init": 2.0, "vocab_rows": 4}, **WIDTHS)
    assert type(align) is AlignConnector
    assert (align.gain_init, align.rows) == (2.0, 4)
    assert type(build_connector({}, **WIDTHS)) is AlignConnector
    assert SMALL.keys() <= CONNECTORS.keys()


def test_options_are_not_changed():
    options = {"type": "mlp", "layers": 1, "pixel_shuffle": 2}
    build_connector(options, **WIDTHS, grid=(3, 3))
    assert options == {"type": "mlp", "layers": 1, "pixel_shuffle": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "aline"}, "type 'aline' is unknown; did you mean 'align'"),
        ({"type": "h-reducer"}, "type 'h-reducer' is unknown; did you mean 'h_reducer'"),
        ({"type": "align", "gain_int": 2}, "'align' has no option 'gain_int'; did you mean 'gain_init'"),
        ({"type": "mlp", "layer": 2}, "'mlp' has no option 'layer'; did you mean 'layers'"),
        ({"type": "mlp", "text_dim": 2}, "no option 'text_dim'"),
        ({"type": "ovis", "grid": [3, 4]}, "'ovis' has no option 'grid'"),
        ({"type": "mlp", "layers": 3}, "layers=3"),
        ({"type": "mlp", "activation": "glu"}, "activation 'glu'; did you mean 'gelu'"),
        ({"type": "mlp", "pixel_shufle": 2}, "no option 'pixel_shufle'; did you mean 'pixel_shuffle'"),
        ({"type": "mlp", "pixel_shuffle": 4}, "pixel_shuffle=4: expected 1 .*2 or 3"),
        ({"type": "perceiver", "latents": 2}, "no option 'latents'; did you mean 'num_latents'"),
        ({"type": "perceiver", "heads": 0}, "heads=0: expected a whole number of at least 1"),
        ({"type": "perceiver", "projection": "mlp"}, "projection 'mlp'.*linear"),
        ({"type": "ovis", "tokenize": "gumble"}, "tokenize 'gumble'; did you mean 'gumbel'"),
        ({"type": "ovis", "visual_vocab": 6}, "visual_vocab=6: expected a whole number of at least 7"),
        ({"type": "ovis", "mark_tiles": True, "indicators": 1}, "indicators=1: .*at least 2"),
        ({"type": "ovis", "tau": 0}, "tau=0: expected a number above 0"),
        ({"type": "ovis", "init_std": "1"}, "init_std='1': expected a number above 0"),
        ({"type": "align", "gain_init": float("nan")}, "gain_init=nan: expected a number above 0"),
        ({"type": "align", "gain_init": True}, "gain_init=True: expected a number above 0"),
        ({"type": "align", "eps": -1e-5}, "eps=-1e-05: expected a number above 0"),
        ({"type": "align", "vocab_rows": "all"}, "vocab_rows='all': expected a whole number of at least 1"),
        ({"type": "align", "start": "head"}, "start 'head'; did you mean 'lm_head'"),
        ({"type": "align_plain", "start": "randon"}, "start 'randon'; did you mean 'random'"),
        ({"type": "align_plain", "collapse": {"mass": 0.5}}, "'align_plain' has no P_vocab, which says what"),
        ({"type": "langbridge", "width": 0}, "width=0: expected a whole number of at least 1"),
        ({"type": "langbridge", "vocab_rows": 12}, "vocab_rows=12: expected 1 to 11"),
        ({"type": "h_reducer", "window": 4}, r"window=4: expected \[rows, columns\]"),
        ({"type": "h_reducer", "window": [1, 0]}, "window_columns=0"),
        ({"type": "c_abstractor", "pool": [2, 5]}, "pool=2 x 5 is larger than a tile's grid of 3 x 4"),
        ({"type": "c_abstractor", "depth": 1.5}, "depth=1.5: expected a whole number"),
    ],
)
def test_unknown_names_and_values(options, message):
    with pytest.raises(ConfigError, match=message):
        build_connector(options, **WIDTHS, grid=(3, 4))


@pytest.mark.parametrize("options", [{"type": "h_reducer"}, {"type": "ovis"}, {"type": "mlp", "pixel_shuffle": 2}])
def test_a_grid_is_needed(options):
    with pytest.raises(ConfigError, match=r"needs vision tokens in rows and columns.*no patch_size"):
        build_connector(options, **WIDTHS)


@pytest.mark.parametrize("name", ["h_reducer", "c_abstractor"])
def test_tokens_that_do_not_fill_the_grid(name):
    connector = build_connector({"type": name, **SMALL[name]}, **WIDTHS, grid=(3, 4))
    for ask in (lambda: connector.tokens_per_tile(13), lambda: connector.project(torch.zeros(1, 13, 5))):
        with pytest.raises(ConfigError, match="3 x 4 = 12 tokens, the vision tower gives 13; a class token"):
            ask()


# Paper's tiles (27 x 27 tokens), and those of the embedded default (3 x 32), which are no squares.
COUNTS = [
    ({"type": "align"}, 729, 96),
    ({"type": "mlp"}, 729, 96),
    ({"type": "mlp", "norm": True}, 729, 96),
    ({"type": "langbridge"}, 729, 96),
    ({"type": "align_plain"}, 729, 96),
    ({"type": "perceiver"}, 64, 64),
    ({"type": "perceiver", "num_latents": 9}, 9, 9),
    ({"type": "ovis", "visual_vocab": 50}, 729, 96),
    ({"type": "ovis", "visual_vocab": 50, "hidden_stride": 2}, 196, 32),
    ({"type": "ovis", "visual_vocab": 50, "hidden_stride": 3}, 81, 11),
    ({"type": "ovis", "visual_vocab": 50, "hidden_stride": 3, "mark_tiles": True}, 83, 13),
    ({"type": "h_reducer"}, 189, 24),
    ({"type": "h_reducer", "end_token": True}, 190, 25),
    ({"type": "c_abstractor", "hidden": 8}, 144, 36),
    ({"type": "mlp", "pixel_shuffle": 2}, 196, 32),
    ({"type": "align", "pixel_shuffle": 3}, 81, 11),
    ({"type": "h_reducer", "pixel_shuffle": 3}, 27, 3),
]


@pytest.mark.parametrize(("options", "square", "line"), COUNTS, ids=str)
def test_tokens_per_tile_are_what_comes_out(options, square, line):
    for grid, expected in (((27, 27), square), ((3, 32), line)):
        connector = build_connector(options, **WIDTHS, grid=grid)
        read = pixel_shuffle(torch.randn(2, grid[0] * grid[1], 5), grid, options.get("pixel_shuffle", 1))
        assert connector.tokens_per_tile(read.shape[1]) == expected
        assert connector(read, torch.randn(11, 6)).embeds.shape == (2, expected, 6)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # d = 1152, D = 3072, V = 128,256: docs/connector.md
        ({"type": "mlp", "layers": 1}, 1152 * 3072 + 3072),
        (
            {"type": "perceiver"},
            64 * 1152 + 6 * (4 * 1152 * 512 + 8 * 1152**2 + 6 * 1152) + 2 * 1152 + 1153 * 3072,
        ),
        ({"type": "ovis"}, 65_531 * (1152 + 2) + 65_536 * 3072),
        ({"type": "ovis", "visual_vocab": None}, 128_251 * (1152 + 2) + 128_256 * 3072),
        ({"type": "h_reducer"}, 4 * 1152 * (4 * 1152 + 1) + 1152 * (4 * 1152 + 1) + 1153 * 3072),
    ],
    ids=str,
)
def test_parameters_at_the_papers_size(options, count):
    with torch.device("meta"):
        widths = {"vision_dim": 1152, "text_dim": 3072, "vocab_size": 128_256}
        built = build_connector(options, **widths, grid=(27, 27))
        assert sum(parameter.numel() for parameter in built.parameters()) == count


@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name, shuffle):
    torch.manual_seed(0)
    connector = build_connector({"type": name, **SMALL[name], "pixel_shuffle": shuffle}, **WIDTHS, grid=(5, 7))
    features = torch.randn(2, 35, 5, requires_grad=True)
    embeds = connector(pixel_shuffle(features, (5, 7), shuffle), torch.randn(11, 6)).embeds
    (embeds * torch.randn_like(embeds)).sum().backward()
    for parameter_name, parameter in [*connector.named_parameters(), ("features", features)]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    assert bool((features.grad.abs().amax(-1) > 0).all()), "every token is read"


@pytest.mark.parametrize("name", SMALL)
def test_lower_precision_gives_lower_precision(name):
    connector = build_connector({"type": name, **SMALL[name]}, **WIDTHS, grid=(3, 4)).bfloat16()
    embeds = connector(torch.randn(2, 12, 5).bfloat16(), torch.randn(11, 6).bfloat16()).embeds
    assert embeds.dtype is torch.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_mixed_precision(name):
    connector = build_connector({"type": name, **SMALL[name]}, **WIDTHS, grid=(3, 4))
    features, table = torch.randn(2, 12, 5), torch.randn(11, 6)
    exact = connector(features, table).embeds
    with torch.autocast("cpu", torch.bfloat16):
        rounded = connector(features.bfloat16(), table).embeds
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_nothing_to_read(name):
    connector = build_connector({"type": name, **SMALL[name]}, **WIDTHS, grid=(3, 4))
    features, table = torch.randn(1, 12, 5), torch.randn(11, 6)
    assert not connector.reads_text
    assert connector(features, table).log_probs is None
    with pytest.raises(ConfigError, match="no P_vocab to read out; use connector type 'align'"):
        connector(features, table, columns=torch.tensor([0]))


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


def test_tokens_are_joined_row_by_row_and_the_edge_is_zero():
    tile = torch.arange(1.0, 13.0).reshape(1, 12, 1)  # 3 x 4
    expected = [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]
    assert pixel_shuffle(tile, (3, 4), 2)[0].tolist() == expected
    assert pixel_shuffle(tile, (3, 4), 1) is tile
    with pytest.raises(ConfigError, match="3 x 4 = 12 tokens, the vision tower gives 11"):
        pixel_shuffle(tile[:, 1:], (3, 4), 2)


def kept_bytes(run):
    """What autograd keeps of a call, parameters left out."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes * (not tensor.is_leaf)}) or tensor,
        lambda tensor: tensor,
    ):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("tokenize", ["softmax", "argmax", "gumbel"])
def test_ovis_keeps_no_weights_of_words_for_backward_and_has_the_same_gradients(monkeypatch, tokenize):
    connector = build_connector({"type": "ovis", "visual_vocab": 500, "tokenize": tokenize}, **WIDTHS, grid=(3, 4))
    connector.double().train()
    features = torch.randn(5, 12, WIDTHS["vision_dim"], dtype=torch.float64, requires_grad=True)

    def project(chunk):
        torch.manual_seed(3)
        return torch.cat([connector.project(part) for part in features.split(chunk)])

    def gradients(tokens):
        return torch.autograd.grad(tokens.square().sum(), [features, *connector.parameters()])

    assert kept_bytes(lambda: project(5)) > 5 * 12 * 495 * 8
    expected = gradients(project(2))  # in pieces by hand: gumbel draws for each
    monkeypatch.setattr("alignvlm_pl.models.connectors.ovis._CHUNK_BYTES", 2 * 12 * 495 * 4)
    for one, other in zip(gradients(project(5)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert kept_bytes(lambda: project(5)) < 12 * 495 * 8


def test_ovis_table_starts_small():
    connector = build_connector({"type": "ovis", "visual_vocab": 4000}, **WIDTHS, grid=(3, 4))
    connector.initialize(torch.zeros(11, 6))
    assert float(connector.table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["align", "align_plain"])
def test_where_w2_starts(name):
    head = 0.03 * torch.randn(4000, 6)
    built = {
        start: build_connector({"type": name, "start": start, "vocab_rows": 3000}, **{**WIDTHS, "vocab_size": 4000})
        for start in ("lm_head", "random")
    }
    for connector in built.values():
        connector.initialize(head)
    assert torch.equal(built["lm_head"].w2.weight, head[:3000])
    rows = built["random"].w2.weight.detach()
    assert float(rows.std()) == pytest.approx(float(head.std()), rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([rows.flatten(), head[:3000].flatten()]))[0, 1])) < 0.05


def test_plain_outputs_start_with_the_scale_of_an_embedding():
    torch.manual_seed(0)
    table = 0.1 * torch.randn(5000, 64)
    connector = build_connector({"type": "align_plain"}, vision_dim=5, text_dim=64, vocab_size=5000)
    connector.initialize(torch.randn(5000, 64))
    embeds = connector(torch.randn(2, 30, 5), table).embeds
    assert float(embeds.detach().square().mean().sqrt()) == pytest.approx(0.1, rel=0.1)


def test_langbridge_leaves_the_text_embeddings_without_a_gradient():
    table = torch.randn(11, 6, requires_grad=True)
    connector = build_connector({"type": "langbridge"}, **WIDTHS)
    connector(torch.randn(1, 2, 5), table).embeds.sum().backward()
    assert table.grad is None
    plain = build_connector({"type": "align_plain"}, **WIDTHS)
    plain(torch.randn(1, 2, 5), table).embeds.sum().backward()
    assert table.grad.abs().max() > 0


def test_the_norm_of_the_mlp_starts_at_that_of_text():
    head = 0.05 * torch.randn(4000, 6)
    connector = build_connector({"type": "mlp", "norm": True}, **{**WIDTHS, "vocab_size": 4000})
    connector.initialize(head)
    embeds = connector(torch.randn(2, 30, 5), head).embeds
    torch.testing.assert_close(embeds.square().mean(-1).sqrt(), torch.full((2, 30), 0.05), rtol=0.05, atol=0)
