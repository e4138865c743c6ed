"""Pruned vocabularies: lists of rows and their errors, calibration, saving, restoring, and the command."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models import AlignVLMForConditionalGeneration
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.build import build_config, build_model, build_processor, load_weights
from alignvlm_pl.models.connectors import build_connector
from alignvlm_pl.models.kept_rows import choose_rows, resolve_kept
from alignvlm_pl.models.pruning import mean_vocabulary, prune, transfer_rows
from alignvlm_pl.models.tiny import VOCAB_SIZE, tiny_spec
from datamodules.shards.writer import ShardWriter

KEPT = [3, 97, 98, 200, 258]


def connector(**options):
    return AlignConnector(5, 6, 11, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_keep": []}, "vocab_keep is empty: expected 1 to 11 token ids"),
        ({"vocab_keep": [1, 11, -1]}, r"2 of 3 ids are out of range, first 11; .* 11 rows \(0 to 10\)"),
        ({"vocab_keep": [1, 4, 2, 4, 1]}, "2 of 5 ids are duplicates, first 4"),
        ({"vocab_keep": [1, 2.0]}, "whole numbers.*found 2.0"),
        ({"vocab_keep": [True]}, "found True"),
        ({"vocab_keep": 4}, "expected a list of token ids, found int"),
        ({"vocab_keep": [1], "vocab_rows": 3}, "vocab_rows=3 and vocab_keep both choose"),
        ({"vocab_keep": "absent.json"}, "vocab_keep='absent.json': No such file"),
    ],
)
def test_wrong_rows(options, message):
    with pytest.raises(ConfigError, match=message):
        build_connector({"type": "align", **options}, vision_dim=5, text_dim=6, vocab_size=11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not JSON"),
        ("{}", "an object with 'kept'"),
        ('{"vocab_size": 49280, "kept": [1]}', "made for a vocabulary of 49280, the LLM has 49152"),
        ("[49152]", r"out of range, first 49152; .* 49152 rows"),
        ('"x"', "expected a list of token ids, found str"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "keep.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_kept({"vocab_keep": str(tmp_path / "keep.json")}, vocab_size=49152)


def test_rows_of_a_list_are_those_of_head_and_table():
    kept = connector(vocab_keep=[7, 2, 9])
    head, table = torch.randn(11, 6), torch.randn(11, 6, requires_grad=True)
    kept.initialize(head)
    assert kept.row_ids() == (2, 7, 9)
    assert torch.equal(kept.w2.weight, head[[2, 7, 9]])
    features = torch.randn(2, 3, 5)
    output = kept(features, table, columns=torch.tensor([9, 2]))
    weights = kept(features, torch.eye(11)).embeds
    assert bool((weights.sum(-1) - 1).abs().max() < 1e-6)
    assert sorted(set(weights.nonzero()[:, 2].tolist())) == [2, 7, 9]
    torch.testing.assert_close(output.embeds, weights @ table)
    torch.testing.assert_close(output.log_probs, weights[..., [9, 2]].log())
    output.embeds.square().sum().backward()
    assert sorted(set(table.grad.nonzero()[:, 0].tolist())) == [2, 7, 9]
    with pytest.raises(ConfigError, match=r"token id 3 .* vocab_keep \(3 of 11 rows\) leaves it out"):
        kept.log_probs(features, torch.tensor([9, 3]))


def test_heads_and_tables_of_other_sizes_are_named():
    whole = connector()
    with pytest.raises(ConfigError, match=r"shape \(11, 6\).*has \(13, 6\).*padded"):
        whole.initialize(torch.zeros(13, 6))
    with pytest.raises(ConfigError, match="vocabulary of 11 but the embedding table has 9 rows"):
        whole(torch.randn(1, 1, 5), torch.randn(9, 6))
    # A table that is padded beyond the head has the same first rows.
    features, table = torch.randn(1, 2, 5), torch.randn(13, 6)
    torch.testing.assert_close(whole(features, table).embeds, whole(features, table[:11]).embeds)


def test_choosing_by_mass_and_by_count():
    shares = [0.1, 0.4, 0.0, 0.3, 0.2]
    assert choose_rows(shares, mass=0.7) == ([1, 3], pytest.approx(0.7))
    assert choose_rows(shares, mass=0.71)[0] == [1, 3, 4]
    assert choose_rows(shares, count=4) == ([0, 1, 3, 4], pytest.approx(1.0))
    assert choose_rows([0.25] * 4, count=2)[0] == [0, 1]  # equal shares: the lower id
    assert choose_rows(shares, mass=0.71, multiple=2) == ([0, 1, 3, 4], pytest.approx(1.0))
    assert choose_rows(shares, count=2, multiple=2)[0] == [1, 3]
    assert choose_rows(shares, count=1, multiple=64) == ([0, 1, 2, 3, 4], pytest.approx(1.0))  # fewer rows: all
    for wrong, message in (
        ({}, "either"),
        ({"mass": 1.1}, "--mass 1.1"),
        ({"count": 6}, "--count 6: .* 1 to 5"),
        ({"count": 3, "multiple": 0}, "--multiple 0: expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_rows(shares, **wrong)


@pytest.fixture
def trained(tmp_path):
    """A specification and a model whose connector is not the head's copy any more."""
    spec = tiny_spec(tmp_path / "tokenizer", connector={"type": "align", "gain_init": 3.0})
    model = build_model(spec, build_processor(spec)).eval()
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return spec, model


def state(model):
    return {name: value.clone() for name, value in model.connector.state_dict().items()}


def test_calibration_is_the_mean_of_the_weights(trained):
    _, model = trained
    pixels = [torch.rand(2, 3, 56, 56), torch.rand(0, 3, 56, 56), torch.rand(1, 3, 56, 56)]
    means, tokens = mean_vocabulary(model, pixels)
    features = torch.cat([model.encode_images(tiles) for tiles in pixels if len(tiles)])
    expected = model.connector(features, torch.eye(VOCAB_SIZE)).embeds.flatten(0, 1)
    assert tokens == len(expected) == 48
    torch.testing.assert_close(torch.tensor(means), expected.mean(0), rtol=1e-4, atol=1e-8)
    with pytest.raises(DataError, match="no visual tokens"):
        mean_vocabulary(model, [])


def test_pruned_models_are_saved_with_their_rows_and_restored(trained, tmp_path):
    _, model = trained
    before, head = state(model), model.get_output_embeddings().weight
    prune(model, KEPT)
    assert model.config.connector == {"type": "align", "gain_init": 3.0, "vocab_keep": KEPT}
    for name in ("w2.weight", "norm2.weight", "norm2.bias"):
        assert torch.equal(state(model)[name], before[name][KEPT])
    model.save_pretrained(tmp_path / "pruned")
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "pruned").eval()
    assert again.connector.row_ids() == tuple(KEPT)
    pixels, table = torch.rand(2, 3, 56, 56), model.get_input_embeddings().weight
    outputs = [m.connector(m.encode_images(pixels), table).embeds for m in (model, again)]
    assert torch.equal(*outputs)
    prune(again, None)
    assert again.config.connector == {"type": "align", "gain_init": 3.0}
    after = state(again)
    others = [row for row in range(VOCAB_SIZE) if row not in KEPT]
    assert torch.equal(after["w2.weight"][KEPT], before["w2.weight"][KEPT])
    assert torch.equal(after["w2.weight"][others], head[others])
    assert torch.equal(after["norm2.weight"][KEPT], before["norm2.weight"][KEPT])
    assert bool((after["norm2.weight"][others] == 3).all())
    assert bool((after["norm2.bias"][others] == 0).all())
    for name in ("w1.weight", "w1.bias", "norm1.weight", "norm1.bias"):
        assert torch.equal(after[name], before[name])


def test_weights_are_pruned_and_restored_by_the_config_alone(trained, tmp_path, caplog):
    spec, model = trained
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "keep.json").write_text(json.dumps(KEPT))
    narrow = dataclasses.replace(spec, connector={**spec.connector, "vocab_keep": str(tmp_path / "keep.json")})
    processor = build_processor(spec)
    assert build_config(narrow, image_token_id=0).connector["vocab_keep"] == KEPT
    pruned = build_model(narrow, processor)
    with caplog.at_level("INFO", logger="alignvlm_pl"):
        load_weights(pruned, tmp_path / "whole")
    assert "ALIGN keeps 5 rows, 5 of them" in caplog.text
    assert torch.equal(pruned.connector.w2.weight, model.connector.w2.weight[KEPT])
    pruned.save_pretrained(tmp_path / "pruned")
    whole = build_model(spec, processor)
    load_weights(whole, tmp_path / "pruned")
    assert torch.equal(whole.connector.w2.weight[KEPT], model.connector.w2.weight[KEPT])
    assert torch.equal(whole.connector.w2.weight[:3], whole.get_output_embeddings().weight[:3])


def test_what_cannot_be_pruned(tmp_path):
    spec = tiny_spec(tmp_path, connector={"type": "mlp"})
    model = build_model(spec, build_processor(spec))
    for call in (lambda: prune(model, [1]), lambda: prune(model, None), lambda: mean_vocabulary(model, [])):
        with pytest.raises(ConfigError, match="connector 'mlp' has no vocabulary to prune"):
            call()
    with pytest.raises(ConfigError, match="a vocabulary of 11, the model has 12"):
        transfer_rows(connector(), AlignConnector(5, 6, 12), torch.zeros(12, 6))


def test_a_frozen_connector_stays_frozen(trained):
    _, model = trained
    model.connector.requires_grad_(False)
    prune(model, KEPT)
    assert not any(parameter.requires_grad for parameter in model.connector.parameters())


@pytest.fixture
def files(tmp_path):
    """A config of a model with weights, and a set of three pictures."""
    spec = tiny_spec(tmp_path / "tokenizer", connector={"type": "align", "gain_init": 5.0})
    content = {"spec": dataclasses.asdict(spec)}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    build_model(spec, build_processor(spec)).save_pretrained(tmp_path / "weights")
    with ShardWriter(tmp_path / "set", name="set", source="s", license="none", samples_per_shard=2) as out:
        for seed in range(3):
            pixels = np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            turns = [
                {"role": "user", "content": [{"type": "image", "index": 0}]},
                {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
            ]
            out.add({"messages": turns}, [buffer.getvalue()], ["png"])
    return tmp_path


def command(files, *options):
    base = ["prune", "--model", files / "model.yaml", "--weights", files / "weights"]
    base += ["--data", files / "set", "--out", files / "keep.json"]
    return main([str(word) for word in (*base, *options)])


def test_the_command_writes_rows_that_a_config_takes(files, capsys):
    assert command(files, "--count", 33, "--multiple", 8, "--json") == 0
    printed = capsys.readouterr().out.splitlines()
    written = json.loads((files / "keep.json").read_text())
    assert len(written["kept"]) == 40
    assert written["vocab_size"] == VOCAB_SIZE
    assert printed[0].startswith(f"40 of {VOCAB_SIZE} rows carry")
    result = json.loads(printed[-1])
    assert result["mass"] == written["mass"]
    assert 40 / VOCAB_SIZE < result["mass"] < 1
    assert command(files, "--mass", result["mass"] - 1e-9, "--multiple", 1) == 0
    again = json.loads((files / "keep.json").read_text())
    assert again["kept"] == written["kept"]
    assert again["visual_tokens"] == written["visual_tokens"] > 0
    assert command(files, "--count", 33) == 0
    assert len(json.loads((files / "keep.json").read_text())["kept"]) == 64
    assert command(files, "--count", 40, "--multiple", 1) == 0
    built = build_connector(
        {"type": "align", "vocab_keep": str(files / "keep.json")},
        vision_dim=5,
        text_dim=6,
        vocab_size=VOCAB_SIZE,
    )
    assert built.row_ids() == tuple(written["kept"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --mass or --count"),
        (("--mass", 0.5, "--count", 3), "give either --mass or --count"),
        (("--mass", 0), "--mass 0.0: expected a share above 0"),
        (("--mass", 1.1), "--mass 1.1: expected a share above 0, at most 1"),
        (("--count", 3, "--multiple", 0), "--multiple 0: expected at least 1"),
        (("--count", 0), "--count 0: expected at least 1"),
        (("--count", 260), "--count 260: expected 1 to 259"),
        (("--count", 3, "--samples", 0), "--samples 0"),
        (("--count", 3, "--device", "cuda:99"), "--device cuda:99: "),
        (("--count", 3, "--model", "no.yaml"), "--model no.yaml: there is no such file; see configs/model/"),
    ],
)
def test_wrong_commands(files, options, message, capsys):
    assert command(files, *options) == 1
    assert message in capsys.readouterr().err
    assert not (files / "keep.json").exists()
