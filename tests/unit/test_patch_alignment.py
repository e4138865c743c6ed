"""The objective `patch`: which characters a visual token covers, and the loss of its output."""

import pytest
import torch
from torch.nn import functional as F

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.patch_alignment import PatchAlignment
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.stage import Stage


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(0)
    spec = tiny_spec(tmp_path_factory.mktemp("tokenizer"), connector={"type": "mlp"})
    processor = build_processor(spec)
    return build_model(spec, processor), PatchAlignment(processor)


def covered(patches, boxes, *lines):
    given = [{"text": text, "box": box} for text, box in lines]
    names = dict(zip(patches.alphabet.columns[1:], patches.alphabet.characters, strict=True))
    return {place: "".join(names[one] for one in ids) for place, ids in patches.targets(boxes, given)}


def test_a_token_covers_the_characters_that_are_over_it(built):
    _, patches = built
    row = [(x, 0, x + 10, 32) for x in range(0, 60, 10)]
    assert covered(patches, row, ("ab c", (10, 4, 50, 28))) == {1: "a", 2: "b", 4: "c"}, "a blank is no target"
    wide = [(0, 0, 30, 32), (30, 0, 60, 32)]
    assert covered(patches, wide, ("abcdef", (0, 4, 60, 28))) == {0: "abc", 1: "def"}
    narrow = [(x, 0, x + 5, 32) for x in range(0, 20, 5)]
    assert covered(patches, narrow, ("ab", (0, 4, 20, 28))) == {0: "a", 1: "a", 2: "b", 3: "b"}
    two_rows = [(0, 0, 10, 32), (0, 32, 10, 64), (0, 64, 10, 96)]
    assert covered(patches, two_rows, ("x", (0, 2, 10, 30)), ("y", (0, 66, 10, 90))) == {0: "x", 2: "y"}
    assert covered(patches, [(5, 5, 5, 5)], ("x", (0, 0, 10, 10))) == {}, "padding has no area"
    assert covered(patches, row, ("", (0, 0, 60, 32))) == {}


def batch_of(tiles, lines):
    sizes = [[(56 * count, 56)] if count else [] for count in tiles]
    pixels = torch.randn(sum(tiles), 3, 56, 56)
    return {"pixel_values": pixels, "tiles": list(tiles), "lines": lines, "sizes": sizes}


def test_the_loss_is_one_less_the_cosine_of_each_token_over_text(built):
    net, patches = built
    lines = [[[{"text": "ab", "box": [0, 0, 28, 14]}]], [[]], []]
    batch = batch_of([1, 1, 0], lines)
    found = patches.loss(net, batch)
    table = net.get_input_embeddings().weight.detach()
    with torch.no_grad():
        outputs = net.connector(net.encode_images(batch["pixel_values"]), table).embeds[0]
    ids = patches.processor.tokenizer("ab")["input_ids"]
    expected = sum(1 - F.cosine_similarity(outputs[place], table[ids[place]], dim=0) for place in (0, 1))
    assert patches.count(net.config, batch) == int(found.supervised) == 2
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.document_sums, torch.stack([expected, *torch.zeros(2)]))
    assert found.document_supervised.tolist() == [2, 0, 0]


def test_the_text_embeddings_get_no_gradient_and_a_batch_without_text_has_one_of_zero(built):
    net, patches = built
    net.zero_grad()
    patches.loss(net, batch_of([1], [[[{"text": "ab", "box": [0, 0, 28, 14]}]]])).total.backward()
    assert all(one.grad.abs().max() > 0 for one in net.connector.parameters())
    assert net.get_input_embeddings().weight.grad is None
    net.zero_grad()
    patches.loss(net, batch_of([1], [[[]]])).total.backward()
    assert all(torch.equal(one.grad, torch.zeros_like(one)) for one in net.connector.parameters())


def test_a_connector_that_joins_tokens_is_refused(tmp_path):
    spec = tiny_spec(tmp_path, connector={"type": "perceiver", "num_latents": 4, "depth": 1})
    processor = build_processor(spec)
    net = build_model(spec, processor)
    with pytest.raises(
        ConfigError, match="needs a visual token for each place, and connector 'perceiver' makes 4 of 4 x 4"
    ):
        PatchAlignment(processor).count(net.config, batch_of([1], [[[]]]))


def test_the_stage_does_not_run_the_llm():
    with pytest.raises(ConfigError, match="objective 'patch' does not run the LLM; set lr_llm to null"):
        Stage(name="a", objective="patch", lr_connector=1e-3, lr_llm=1e-3)
