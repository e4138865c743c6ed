"""Models that are built without memory and read in slices, against the ordinary way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.models.build import Backbone, ModelSpec, build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.strategies.meta_init import build_on_meta, load_parts, parameters_on_meta


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A specification, its processor, its random model, and where the model and its parts are saved."""
    folder = tmp_path_factory.mktemp("saved")
    spec = tiny_spec(folder / "tokenizer", tied=request.param)
    processor = build_processor(spec)
    model = build_model(spec, processor)
    model.save_pretrained(folder / "whole")
    model.vision_tower.save_pretrained(folder / "vision")
    model.language_model.save_pretrained(folder / "llm")
    return spec, processor, model, folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_nothing_has_memory_until_it_is_read_and_then_everything_is_right(saved):
    spec, processor, model, folder = saved
    found = build_on_meta(spec, processor, whole=True)
    assert all(parameter.is_meta for parameter in found.parameters())
    found.connector.requires_grad_(False)
    load_parts(found, spec, folder / "whole")
    assert_same(found.state_dict(), model.state_dict())
    assert_same(dict(found.named_buffers()), dict(model.named_buffers()))
    assert {n for n, p in found.named_parameters() if not p.requires_grad} == {
        f"connector.{name}" for name, _ in found.connector.named_parameters()
    }
    tables = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == model.config.tie_word_embeddings


def test_pretrained_parts_are_read_and_the_connector_starts_from_their_head(saved):
    spec, processor, model, folder = saved
    parts = {
        "vision": Backbone(pretrained=str(folder / "vision")),
        "llm": Backbone(pretrained=str(folder / "llm"), tokenizer=spec.llm.tokenizer),
    }
    found = build_on_meta(ModelSpec(**{**vars(spec), **parts}), processor, whole=False)
    assert not any(parameter.is_meta for parameter in found.connector.parameters())
    load_parts(found, ModelSpec(**{**vars(spec), **parts}), None)
    for part in ("vision_tower", "language_model"):
        assert_same(getattr(found, part).state_dict(), getattr(model, part).state_dict())
    assert torch.equal(found.connector.w2.weight, model.get_output_embeddings().weight)
    assert 0.01 < float(found.connector.w1.weight.detach().std()) < 0.03, "the start that transformers gives"
    assert found.generation_config.eos_token_id == processor.end_of_turn_id


def test_parts_with_random_weights_are_real(saved):
    spec, processor, _, _ = saved
    found = build_on_meta(spec, processor, whole=False)
    load_parts(found, spec, None)
    assert not any(parameter.is_meta for parameter in found.parameters())
    assert torch.equal(found.connector.w2.weight, found.get_output_embeddings().weight)


def test_a_file_may_nest_the_vision_model_one_level_deeper(saved, tmp_path):
    spec, processor, model, folder = saved
    state = {f"vision_model.{name}": value for name, value in model.vision_tower.state_dict().items()}
    save_file({**state, "text_model.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "vision/config.json").read_text())
    nested = ModelSpec(**{**vars(spec), "vision": Backbone(pretrained=str(tmp_path))})
    found = build_on_meta(nested, processor, whole=False)
    load_parts(found, nested, None)
    assert_same(found.vision_tower.state_dict(), model.vision_tower.state_dict())


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: _without(s, "connector.w1.weight"),
            "lack 1 of the model's tensors, first 'connector.w1.weight'",
        ),
        (
            lambda s: {**s, "connector.w3": torch.zeros(2)},
            "hold 1 tensors that the model lacks, first 'connector.w3'",
        ),
        (
            lambda s: {**s, "connector.w2.weight": torch.zeros(9, 64)},
            r"'connector.w2.weight' of shape \(9, 64\), the model's is \(259, 64\)",
        ),
        (None, "cannot be read in slices from"),
    ],
)
def test_weights_of_another_model(saved, tmp_path, change, told):
    spec, processor, _, folder = saved
    (tmp_path / "config.json").write_text((folder / "whole/config.json").read_text())
    if change is not None:
        save_file(change(load_file(folder / "whole/model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=told):
        load_parts(build_on_meta(spec, processor, whole=True), spec, tmp_path)


def test_a_damaged_file(saved, tmp_path):
    spec, processor, _, folder = saved
    (tmp_path / "config.json").write_text((folder / "whole/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "whole/model.safetensors").read_bytes()[:900])
    with pytest.raises(CheckpointError, match="cannot be read in slices from"):
        load_parts(build_on_meta(spec, processor, whole=True), spec, tmp_path)


def test_only_parameters_lose_their_memory_and_only_within():
    with parameters_on_meta():
        norm = torch.nn.BatchNorm1d(3)
        assert norm.weight.is_meta
        assert not norm.running_var.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("size", [10**9, 200_000])
def test_weights_in_one_or_several_files_are_read(saved, tmp_path, size):
    spec, processor, model, _ = saved
    model.save_pretrained(tmp_path / "found", max_shard_size=size)
    assert ((tmp_path / "found/model.safetensors").is_file()) == (size == 10**9)
    again = build_on_meta(spec, processor, whole=True)
    load_parts(again, spec, tmp_path / "found")
    assert_same(again.state_dict(), model.state_dict())
