"""Adapters: peft's own result when merged and when read back, the frozen base, and settings that are refused."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.lora import attach_adapters, merge_state, num_parameters, save_adapters
from alignvlm_pl.training.lora_config import Lora, parse_adapters
from alignvlm_pl.training.optim import freeze, parameter_groups
from alignvlm_pl.training.part_table import part_rows
from alignvlm_pl.training.stage import Stage

pytest.importorskip("peft")
BOTH = {"llm": {"r": 4, "alpha": 12}, "vision": {"r": 2, "target_modules": ["q_proj", "self_attn.v_proj"]}}


def fresh(folder):
    torch.manual_seed(0)
    spec = tiny_spec(folder)
    return build_model(spec, build_processor(spec)).eval()


@pytest.fixture
def model(tmp_path):
    return fresh(tmp_path / "tokenizer")


def adapted(model, settings=BOTH):
    """The model with adapters that have been trained, so to speak."""
    attach_adapters(model, parse_adapters(settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def inputs(model):
    image = model.config.image_token_id
    ids = torch.tensor([[5, *[image] * model.config.tokens_per_tile, 7, 8, 9]])
    pixels = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
    return {"input_ids": ids, "pixel_values": pixels, "num_tiles": torch.tensor([1])}


def logits(model):
    with torch.inference_mode():
        return model(**inputs(model)).logits


def test_a_fresh_adapter_changes_no_logit(model):
    before = logits(model)
    attach_adapters(model, parse_adapters(BOTH))
    assert torch.equal(logits(model), before)


def test_only_the_last_blocks_have_adapters(model, tmp_path):
    adapted(model, {"llm": {"r": 4, "last_blocks": 1}})
    names = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    assert len(names) == 7 and all(".layers.1." in name for name in names)
    expected = logits(model)
    plain = fresh(tmp_path / "again")
    plain.load_state_dict(merge_state(model), strict=True)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"stage.lora.llm.last_blocks=3: the part has 2 blocks; set at most so many"):
        attach_adapters(fresh(tmp_path / "more"), parse_adapters({"llm": {"last_blocks": 3}}))


def test_the_merged_state_gives_the_adapted_models_logits_in_a_plain_model(model, tmp_path):
    before = logits(model)
    adapted(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    plain = fresh(tmp_path / "again")
    plain.load_state_dict(merge_state(model), strict=True)
    # float32, one product in place of three. Measured: 3e-7 of logits up to 0.5.
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_the_merged_weights_are_those_that_peft_merges(model):
    adapted(model)
    merged = merge_state(model)
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "merge")]
    assert len(layers) == 2 * 7 + 2 * 2
    for name, layer in layers:
        layer.merge()
        torch.testing.assert_close(merged[f"{name}.weight"], layer.base_layer.weight, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked by peft of transformers
def test_peft_reads_the_saved_adapter_onto_the_bare_llm(model, tmp_path):
    from peft import PeftModel

    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.load_state_dict(model.language_model.state_dict())
    adapted(model)
    save_adapters(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"llm", "vision"}
    read = PeftModel.from_pretrained(bare, tmp_path / "adapter" / "llm")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        assert torch.equal(read(ids).logits, model.language_model(ids).logits)


def test_only_adapters_and_other_trained_parts_are_in_the_optimizer(model):
    stage = Stage(name="x", lr_connector=1e-3, lr_llm=1e-4, lora={"llm": {"r": 4}})
    plain = num_parameters(model.language_model)
    freeze(model, stage)
    attach_adapters(model, stage.adapters)
    groups = {group["name"]: group for group in parameter_groups(model, stage)}
    trained = {id(p) for group in groups.values() for p in group["params"]}
    for name, parameter in model.named_parameters():
        wanted = ".lora_" in name or name.startswith("connector.")
        assert (id(parameter) in trained) == wanted == parameter.requires_grad, name
    assert groups["llm/decay"]["lr"] == 1e-4
    rows = {row[0]: row for row in part_rows(model, stage)}
    # Each layer: q and o 64x64, k and v 32x64, three of the feed-forward 128x64; r rows and columns of each.
    added = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert rows["llm (LoRA r=4)"][1:4] == (f"{plain + added:,}", f"{added:,}", "0.0001")


def test_the_embedding_table_and_the_head_stay_as_they_are(model):
    attach_adapters(model, parse_adapters({"llm": {}}))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"connector": {}}, r"stage.lora.connector: this part takes no adapter; known: llm, vision"),
        ({"llm": {"rank": 4}}, r"stage.lora.llm has no setting 'rank'; known: alpha"),
        ({"llm": {"r": 0}}, r"stage.lora.llm.r=0: expected a whole number of at least 1"),
        ({"llm": {"r": "8"}}, r"stage.lora.llm.r='8': expected a whole number"),
        ({"llm": {"alpha": 0}}, r"stage.lora.llm.alpha=0: expected a number above 0"),
        ({"llm": {"dropout": 1.0}}, r"stage.lora.llm.dropout=1.0: expected a share in \[0, 1\)"),
        ({"llm": {"target_modules": "q_proj"}}, r"stage.lora.llm.target_modules='q_proj': expected a list"),
        ({"vision": {}}, r"stage.lora.vision needs stage.lr_vision, the adapter's learning rate; it is None"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        Stage(name="x", lr_llm=1e-4, lora=lora)


@pytest.mark.parametrize("name", ["q_projj", "lm_head", "embed_tokens"])
def test_a_layer_that_is_not_there_is_named(model, name):
    message = rf"stage.lora.llm.target_modules: there is no linear layer '{name}' that takes an adapter; .*q_proj"
    with pytest.raises(ConfigError, match=message):
        attach_adapters(model, {"llm": Lora(target_modules=["q_proj", name])})


@pytest.mark.parametrize(("package", "setting"), [("peft", {}), ("bitsandbytes", {"load_in_4bit": True})])
def test_a_missing_package_is_named_with_its_command(model, monkeypatch, package, setting):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=rf"stage.lora.llm.* not installed: pip install {package}"):
        attach_adapters(model, parse_adapters({"llm": setting}))


def test_four_bits_without_cuda_are_refused(model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "bitsandbytes" else name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"stage.lora.llm.load_in_4bit needs a CUDA device, and none was found"):
        attach_adapters(model, {"llm": Lora(load_in_4bit=True)})


def test_a_four_bit_base_is_near_the_base_trains_an_adapter_and_merges(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("alignvlm_pl.training.lora._check_4bit", lambda part: None)  # its own CPU code will do here
    model, plain = fresh(tmp_path / "a"), fresh(tmp_path / "b")
    before = num_parameters(model.language_model)
    adapted(model, {"llm": {"r": 4, "load_in_4bit": True}})
    device = model.language_model.model.layers[0].mlp.up_proj.base_layer.weight.device
    model.to(device)
    weight = model.language_model.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    assert num_parameters(model.language_model) > before
    model(**{name: value.to(device) for name, value in inputs(model).items()}).logits.sum().backward()
    assert weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_A." in name)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any("base_layer.weight" in name for name in state)
    model.load_state_dict(state, strict=True)
    merged = merge_state(model)
    plain.load_state_dict(merged, strict=True)
    expected = model.to("cpu")(**inputs(model)).logits
    # The 4-bit layers compute in bfloat16. Measured: 6e-3 of logits up to 0.5.
    torch.testing.assert_close(plain(**inputs(plain)).logits, expected, rtol=0, atol=0.03)
