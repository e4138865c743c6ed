"""Building from parts: embedded names, folders, weights of another model, the meta device."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.models import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm_pl.models import build as build_file
from alignvlm_pl.models.build import (
    Backbone,
    build_config,
    build_model,
    build_processor,
    load_weights,
)
from alignvlm_pl.models.loading import choose_attention, load_pretrained
from alignvlm_pl.models.modeling import connector_features
from alignvlm_pl.models.tiny import tiny_llm, tiny_spec, tiny_vision
from alignvlm_pl.models.vision import build_vision_tower, token_grid
from alignvlm_pl.training.module import AlignVLMModule


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a tiny vision model, its LLM, and the whole, with the specification."""
    folder = tmp_path_factory.mktemp("saved")
    spec = tiny_spec(folder / "tokenizer")
    torch.manual_seed(1)
    model = build_model(spec, build_processor(spec))
    model.save_pretrained(folder / "whole")
    model.language_model.save_pretrained(folder / "llm")
    AutoModel.from_config(spec.vision.load_config()).save_pretrained(folder / "vision")
    return folder, spec


def with_pretrained(spec, *, vision=None, llm=None):
    return dataclasses.replace(
        spec,
        vision=dataclasses.replace(spec.vision, pretrained=vision and str(vision)),
        llm=dataclasses.replace(spec.llm, pretrained=llm and str(llm)),
    )


@pytest.mark.parametrize("feature", ["last_normed", "last", "penultimate"])
def test_parts_are_loaded_and_the_connector_follows_the_head(saved, feature):
    folder, spec = saved
    spec = dataclasses.replace(
        with_pretrained(spec, vision=folder / "vision", llm=folder / "llm"), vision_feature=feature
    )
    model = build_model(spec, build_processor(spec))
    vision = AutoModel.from_pretrained(folder / "vision").state_dict()
    whole = AlignVLMForConditionalGeneration.from_pretrained(folder / "whole")
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, vision[name]), name
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, whole.language_model.state_dict()[name]), name
    assert torch.equal(model.connector.w2.weight, model.get_output_embeddings().weight)


def test_configuration_comes_from_the_folder(saved):
    folder, spec = saved
    vision = Backbone(pretrained=str(folder / "vision")).load_config()
    assert (vision.model_type, vision.hidden_size) == ("siglip_vision_model", 32)
    assert Backbone(pretrained=str(folder / "llm")).load_config().hidden_size == 64
    assert spec.llm.load_config().vocab_size == 259


@pytest.mark.parametrize(
    ("vision", "llm", "message"),
    [
        ("llm", "llm", r"vision weights in .*llm lack \d+ of the model's tensors"),
        ("vision", "vision", "LLM weights cannot be loaded from .*vision"),
        ("absent", "llm", "vision weights: there is no folder .*absent"),
        ("vision", "absent", "LLM weights: there is no folder .*absent"),
    ],
)
def test_weights_of_another_kind(saved, vision, llm, message):
    folder, spec = saved
    processor = build_processor(spec)
    with pytest.raises(CheckpointError, match=message):
        build_model(with_pretrained(spec, vision=folder / vision, llm=folder / llm), processor)


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_weights_of_another_size(saved, part):
    folder, spec = saved
    wide = Backbone(config=tiny_vision(width=64)) if part == "vision" else Backbone(config=tiny_llm(width=32))
    wide = dataclasses.replace(wide, pretrained=str(folder / part), tokenizer=getattr(spec, part).tokenizer)
    with pytest.raises(CheckpointError, match="size mismatch"):
        build_model(dataclasses.replace(spec, **{part: wide}), build_processor(spec))


@pytest.mark.parametrize("tied", [True, False])
def test_an_llm_whose_embeddings_were_resized_or_padded(saved, tmp_path, tied):
    """The number of rows in its config is another than that of its weights: both are named."""
    _, spec = saved
    config = dataclasses.replace(spec.llm, config={**spec.llm.config, "tie_word_embeddings": tied})
    llm = AutoModelForCausalLM.from_config(config.load_config())
    llm.resize_token_embeddings(288, mean_resizing=False)
    llm.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 259}))
    with pytest.raises(CheckpointError, match=r"shape \(288, 64\), by config.json it is \(259, 64\).*padded"):
        build_model(with_pretrained(spec, llm=tmp_path), build_processor(spec))


def test_an_llm_without_a_head(saved, tmp_path):
    _, spec = saved
    config = dataclasses.replace(spec.llm, config={**spec.llm.config, "tie_word_embeddings": False})
    AutoModel.from_config(config.load_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors, first 'lm_head.weight'"):
        build_model(with_pretrained(spec, llm=tmp_path), build_processor(spec))


def test_damaged_weights(saved, tmp_path):
    folder, spec = saved
    for file in (folder / "llm").iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(CheckpointError, match="LLM weights cannot be loaded"):
        build_model(with_pretrained(spec, llm=tmp_path), build_processor(spec))


def test_pretrained_parts_are_not_read_where_the_weights_of_a_whole_model_are(saved, tmp_path):
    folder, spec = saved
    for file in (folder / "llm").iterdir():
        (tmp_path / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    module = AlignVLMModule(spec=with_pretrained(spec, llm=tmp_path), weights=str(folder / "whole"))
    module.configure_model()
    expected = AlignVLMForConditionalGeneration.from_pretrained(folder / "whole").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.net.state_dict().items())


def test_load_weights(saved):
    folder, spec = saved
    model = build_model(spec, build_processor(spec))
    load_weights(model, folder / "whole")
    expected = AlignVLMForConditionalGeneration.from_pretrained(folder / "whole").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_load_weights_of_another_model(saved, tmp_path):
    folder, spec = saved
    other = dataclasses.replace(spec, connector={"type": "mlp"})
    model = build_model(other, build_processor(spec))
    with pytest.raises(CheckpointError, match=r"another model than the configured one.*connector\.layers"):
        load_weights(model, folder / "whole")
    with pytest.raises(CheckpointError, match="type 'llama', expected 'alignvlm'"):
        load_weights(model, folder / "llm")
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        load_weights(model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_weights(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((folder / "whole/config.json").read_text())}))
    with pytest.raises(CheckpointError, match="AlignVLM weights cannot be loaded"):
        load_weights(model, tmp_path)


def test_the_folder_of_a_backbone(monkeypatch, tmp_path):
    monkeypatch.setitem(build_file.EMBEDDED_WEIGHTS, "smollm2", lambda: tmp_path)
    assert Backbone(pretrained="embedded:smollm2").folder() == str(tmp_path)
    assert Backbone(pretrained="google/siglip").folder() == "google/siglip"
    assert Backbone(pretrained=None).folder() is None
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        Backbone(pretrained="embedded:smolm2").folder()


def test_a_backbone_must_say_what_it_is(saved):
    _, spec = saved
    with pytest.raises(ConfigError, match="needs `pretrained`"):
        Backbone().load_config()
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        Backbone(config={"model_type": "lama"}).load_config()
    with pytest.raises(ConfigError, match="model_type None"):
        Backbone(config={"hidden_size": 3}).load_config()
    with pytest.raises(CheckpointError, match="no model configuration in '/absent/folder'"):
        Backbone(pretrained="/absent/folder").load_config()
    no_tokenizer = dataclasses.replace(spec, llm=Backbone(config=tiny_llm()))
    with pytest.raises(ConfigError, match="neither `tokenizer` nor `pretrained`"):
        build_processor(no_tokenizer)
    absent = dataclasses.replace(spec, llm=Backbone(config=tiny_llm(), tokenizer="/absent/folder"))
    with pytest.raises(CheckpointError, match="no tokenizer in '/absent/folder'"):
        build_processor(absent)


def test_a_tile_size_the_tower_does_not_take(tmp_path):
    spec = tiny_spec(tmp_path, tiling={"tile_width": 84})
    with pytest.raises(ConfigError, match=r"tile_width=84 \(image_size 56\)"):
        build_processor(spec)


def test_meta_device(tmp_path):
    """A model far larger than memory is described without any."""
    llm = tiny_llm(width=8192, layers=8, vocab_size=200_000)
    spec = dataclasses.replace(tiny_spec(tmp_path), llm=Backbone(config=llm))
    config = build_config(spec, image_token_id=259)
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) > 5_000_000_000
    assert config.tokens_per_tile == 16


def test_the_placeholder_is_never_generated_where_the_llm_could(saved):
    _, spec = saved
    processor = build_processor(spec)
    assert build_model(spec, processor).generation_config.suppress_tokens is None
    padded = dataclasses.replace(spec, llm=dataclasses.replace(spec.llm, config=tiny_llm(vocab_size=272)))
    assert build_model(padded, processor).generation_config.suppress_tokens == [processor.image_token_id]


def test_penultimate_needs_layers():
    config = Backbone(
        config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    ).load_config()
    with pytest.raises(ConfigError, match="'penultimate' needs a model with num_hidden_layers"):
        build_vision_tower(config, "penultimate")
    with pytest.raises(ConfigError, match="no final norm"):
        build_vision_tower(config, "last")


def test_pixels_are_cast_to_the_towers_precision():
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, dtype=torch.bfloat16)

        def forward(self, pixel_values):
            self.last_hidden_state = self.layer(pixel_values)
            return self

    config = SimpleNamespace(vision_config=SimpleNamespace(hidden_size=2), connector={})
    assert connector_features(Tower(), torch.zeros(1, 3, 4, 4), config).dtype == torch.bfloat16


def test_attention_is_chosen_by_name_and_gives_the_same_numbers(saved):
    llm, ids = (
        AutoModelForCausalLM.from_pretrained(saved[0] / "llm"),
        torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
    )
    mask = (ids > 0).long()
    found = {}
    for name in ("eager", "sdpa"):
        choose_attention(llm, name)
        assert llm.config._attn_implementation == name
        found[name] = llm(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found["eager"], found["sdpa"])
    with pytest.raises(ConfigError, match=r"model.attention='sdap'.*attn_implementation"):
        choose_attention(llm, "sdap")


def test_token_grid(saved):
    _, spec = saved
    tiling = build_processor(spec).geometry
    assert token_grid(spec.vision.load_config(), tiling) == (4, 4)
    rectangular = dataclasses.make_dataclass("Config", [("patch_size", tuple)])((8, 4))
    assert token_grid(rectangular, tiling) == (7, 14)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'last_norm' is unknown; did you mean 'last_normed'"):
        AlignVLMConfig(tiny_vision(), tiny_llm(), vision_feature="last_norm")
    with pytest.raises(ConfigError, match="model_type 'lama' is unknown to transformers; did you mean 'llama'"):
        AlignVLMConfig(tiny_vision(), {**tiny_llm(), "model_type": "lama"})
    config = AlignVLMConfig(tiny_vision(), tiny_llm(logit_scale=0.1))
    with pytest.raises(ConfigError, match=r"text_config\.logit_scale is set"):
        AlignVLMForConditionalGeneration(config)
    spec = tiny_spec(tmp_path, connector={"type": "mlp"})
    model = build_model(spec, build_processor(spec))
    with pytest.raises(ConfigError, match="'mlp' has no P_vocab"):
        model.read(torch.zeros(1, 3, 56, 56), torch.tensor([1]))


def test_pretrained_parts_load_within_the_context_of_a_device_and_without_accelerate(saved, monkeypatch):
    """As Lightning builds a model on a GPU."""
    folder, _ = saved
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with torch.device("cpu", 0):
        model, missing = load_pretrained(AutoModelForCausalLM, folder / "llm", what="LLM")
    assert not missing
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
