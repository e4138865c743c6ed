"""The PP-OCR trunk with random weights: shapes, order of patches, gradients, save and load, errors."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.pp_ocr import PPOCRVisionConfig, PPOCRVisionModel

BLOCKS = [[16, 1, True], [24, 2, False], [24, 1, True], [32, 2, False], [32, 1, False]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PPOCRVisionModel(PPOCRVisionConfig(stem_channels=8, blocks=BLOCKS)).eval()


@pytest.mark.parametrize(("height", "width", "tokens"), [(32, 8, 1), (64, 40, 10), (96, 16, 6)])
def test_one_token_for_each_32_by_8_pixels(model, height, width, tokens):
    output = model(torch.rand(2, 3, height, width)).last_hidden_state
    assert output.shape == (2, tokens, 32 * 4)
    assert model.config.tokens_for(height, width) == tokens


def test_tokens_are_rows_of_cell_groups(model):
    """Token 4 of a 64x24 image is row 1, column 1: cells (2..3, 2..3), row by row, channels innermost."""
    image = torch.rand(1, 3, 64, 24)
    cells = model.features(image)[0]
    token = model(image).last_hidden_state[0, 4]
    expected = torch.cat([cells[:, 2, 2], cells[:, 2, 3], cells[:, 3, 2], cells[:, 3, 3]])
    torch.testing.assert_close(token, expected, rtol=0, atol=0)


def test_another_cell_group_changes_the_patch(model):
    config = PPOCRVisionConfig(stem_channels=8, blocks=BLOCKS, cell_group=(1, 4))
    assert config.patch_size == (16, 16)
    assert config.hidden_size == 32 * 4
    assert PPOCRVisionModel(config)(torch.rand(1, 3, 32, 48)).last_hidden_state.shape == (1, 6, 128)


def test_the_first_convolution_sees_bgr(model):
    """Only red is lit; a kernel that reads its last channel sees it."""
    with torch.no_grad():
        model.stem.entry.weight.zero_()
        model.stem.entry.weight[:, 2, 1, 1] = 1.0
    red = torch.zeros(1, 3, 32, 8)
    red[:, 0] = 1.0
    seen = []
    model.stem.entry.register_forward_hook(lambda module, args, output: seen.append(output))
    model(red)
    assert seen[0].min() == seen[0].max() == 1.0


def test_every_parameter_gets_a_gradient(model):
    model(torch.randn(2, 3, 64, 32)).last_hidden_state.square().mean().backward()
    without = [name for name, weight in model.named_parameters() if not _has_gradient(weight)]
    assert without == []


def test_random_weights_keep_the_scale(model):
    """A variance that dies or explodes over the blocks would make the random trunk useless in tests."""
    std = model(torch.randn(2, 3, 64, 64)).last_hidden_state.std().item()
    assert 0.05 < std < 50


def test_bfloat16_autocast_stays_near_float32(model):
    image = torch.rand(1, 3, 64, 32) * 2 - 1
    reference = model(image).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image).last_hidden_state
    assert output.dtype == torch.bfloat16
    assert ((output.float() - reference).norm() / reference.norm()).item() < 0.05


def test_round_trip_through_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, PPOCRVisionModel)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    image = torch.rand(1, 3, 32, 16)
    assert torch.equal(loaded(image).last_hidden_state, model(image).last_hidden_state)


def test_the_default_config_is_the_published_trunk():
    with torch.device("meta"):
        trunk = PPOCRVisionModel(PPOCRVisionConfig())
    assert trunk.config.hidden_size == 1536
    assert trunk.config.patch_size == (32, 8)
    assert trunk.num_parameters() == 2_676_000


@pytest.mark.parametrize(("height", "width"), [(48, 16), (64, 20), (0, 8)])
def test_a_side_that_does_not_divide_is_refused(model, height, width):
    with pytest.raises(ConfigError, match=rf"tile of {height}x{width} px .* of 32x8 px; choose multiples"):
        model(torch.rand(1, 3, height, width))


def test_a_wrong_input_is_refused(model):
    with pytest.raises(DataError, match=r"shape \(1, 1, 32, 16\), expected \(tiles, 3, height, width\)"):
        model(torch.rand(1, 1, 32, 16))


def test_a_contradicting_hidden_size_is_refused():
    with pytest.raises(ConfigError, match=r"hidden_size=768, but .* give 1536; leave hidden_size out"):
        PPOCRVisionConfig(hidden_size=768)


def _has_gradient(weight):
    return weight.grad is not None and bool(weight.grad.any())
