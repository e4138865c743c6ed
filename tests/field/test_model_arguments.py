"""The model honours what Hugging Face's examples hand it, or refuses it in words.

transformers PR#30962 and LLaVA-NeXT#169 (arguments that are taken and ignored); `labels=input_ids`, as in the
examples of language models, and `resize_token_embeddings`.
"""

import copy
import functools
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm_pl.models.pixels import as_tiles
from alignvlm_pl.models.processing import AlignVLMProcessor
from tests.parity.tiny_pages import batch_of, inputs_of, make, picture


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    for part in parts:
        part.save_pretrained(folder)
    return folder


def test_the_prompt_as_labels_supervises_its_text_alone(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0]))
    visual = batch["input_ids"] == processor.image_token_id
    masked = batch["input_ids"].masked_fill(visual, -100)
    found, expected = (model(**batch, labels=labels) for labels in (batch["input_ids"], masked))
    assert torch.equal(found.loss, expected.loss)
    assert float(found.num_supervised) == int((~visual).sum()) - 1
    assert found.loss.isfinite()


@pytest.mark.parametrize("size", [{"new_num_tokens": 300}, {"new_num_tokens": 3}, {"pad_to_multiple_of": 64}], ids=str)
def test_another_vocabulary_is_refused_and_nothing_changed(parts, size):
    _, model = parts
    with pytest.raises(
        ConfigError, match=r"resize_token_embeddings\(.*bound to the 259 rows of the vocabulary; resize"
    ):
        model.resize_token_embeddings(**size)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(259).weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 259


@pytest.mark.parametrize("which", ["input", "output"])
def test_embeddings_are_set_in_the_llm(parts, which):
    _, model = parts
    get, put = (getattr(model, f"{verb}_{which}_embeddings") for verb in ("get", "set"))
    old = get()
    new = copy.deepcopy(old)
    put(new)
    assert get() is getattr(model.language_model, f"get_{which}_embeddings")() is new
    for wrong in (torch.nn.Linear(64, 300), torch.nn.Linear(8, 259), torch.nn.Identity()):
        with pytest.raises(
            ConfigError, match=rf"set_{which}_embeddings: weight of shape \(.*\), expected \(259, \d+\)"
        ):
            put(wrong)
    assert get() is new
    put(old)


SHAPES = {
    "already shifted": lambda labels: labels[:, 1:],
    "one row": lambda labels: labels[0],
    "fewer rows": lambda labels: labels[:1],
    "flat": lambda labels: labels.flatten(),
    "with a last axis": lambda labels: labels[..., None],
    "longer": lambda labels: torch.cat([labels, labels], dim=1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_labels_of_another_shape_are_named(parts, case):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1]))
    labels = SHAPES[case](batch["input_ids"])
    expected = f"labels have shape {tuple(labels.shape)}, expected {tuple(batch['input_ids'].shape)}, as the input"
    with pytest.raises(DataError, match=re.escape(expected)):
        model(**batch, labels=labels)


def test_labels_that_are_no_ids_are_named(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1]))
    labels = batch["input_ids"]
    for position in (0, -1):
        for token in (260, 309, -1, -101):  # -100 is the one that is ignored
            wrong = labels.clone()
            wrong[1, position] = token
            with pytest.raises(
                DataError, match=f"^labels have the id {token}, expected 0 to 258 of the LLM's vocabulary"
            ):
                model(**batch, labels=wrong)
    for kind in (torch.float32, torch.bool):
        with pytest.raises(DataError, match=f"labels are of {kind}, expected ids"):
            model(**batch, labels=labels.to(kind))
    expected = model(**batch, labels=labels).loss
    assert torch.equal(model(**batch, labels=labels.int()).loss, expected)


INPUTS = {
    "attention_mask": [
        *(lambda v: v[:, :3], lambda v: torch.cat([v, v], 1), lambda v: v[:1], lambda v: v[0]),
        *(lambda v: v[:, None, None], lambda v: v.tolist(), lambda v: v.numpy()),
    ],
    "position_ids": [lambda v: v[:, :2], lambda v: v[0], lambda v: v.float(), lambda v: v.tolist()],
    "input_ids": [lambda v: v.float(), lambda v: v.tolist(), lambda v: v[0], lambda v: v[:0], lambda v: v[:, :0]],
    "pixel_values": [lambda v: v[:, :1], lambda v: v[..., :20], lambda v: v[None], lambda v: v.numpy(), lambda v: v[0]],
    "num_tiles": [lambda v: v.tolist(), lambda v: 3, lambda v: v[:1], lambda v: v.float(), lambda v: v[0]],
}


@pytest.mark.parametrize(("name", "change"), [(name, one) for name, them in INPUTS.items() for one in them])
def test_an_input_of_another_type_or_shape_is_named(parts, name, change):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1]))
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    changed = batch | {name: change(batch[name])}
    for run in (model, functools.partial(model.generate, max_new_tokens=1)):
        with pytest.raises(DataError, match=rf"^{name} (.*\) )?(have shape|are of|is of|is of type) .*, expected "):
            run(**changed)


def test_a_batch_that_is_no_tensors_is_named(parts):
    processor, model = parts
    for kind, found in (("np", "ndarray"), (None, "list")):
        batch = processor(text="a", return_tensors=kind)
        with pytest.raises(DataError, match=f"is of type {found}, expected a torch tensor; .*return_tensors='pt'"):
            model.generate(**batch, max_new_tokens=1)
    ids = torch.tensor([[5, 6]])
    for given in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(DataError, match="needs input_ids or inputs_embeds, and not both"):
            model(**given)


def test_the_mask_covers_what_the_cache_holds(parts):
    model = parts[1]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits[:, 3]
        for length in (1, 3, 5):
            cache = model(ids[:, :3]).past_key_values
            with pytest.raises(DataError, match=rf"attention_mask have shape \(1, {length}\), expected \(1, 4\)"):
                model(ids[:, 3:], past_key_values=cache, attention_mask=torch.ones(1, length, dtype=torch.int64))
        cache = model(ids[:, :3]).past_key_values
        found = model(ids[:, 3:], past_key_values=cache, attention_mask=torch.ones(1, 4, dtype=torch.int64)).logits
        torch.testing.assert_close(found[:, 0], expected)
        causal = torch.ones(4, 4).tril().bool()[None, None]
        torch.testing.assert_close(model(ids, attention_mask=causal).logits[:, 3], expected)


def test_ids_of_another_tokenizer_are_named(parts):
    _, model = parts
    for token in (260, 50_000, -1):
        for run in (model, functools.partial(model.generate, max_new_tokens=1)):
            with pytest.raises(DataError, match=f"input_ids have an id of .*{token}.*, expected 0 to 258 of the LLM's"):
                run(torch.tensor([[5, token]]))


def test_arguments_of_forward(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1]))
    with torch.no_grad():
        plain = model(**batch)
        for name in ("bogus", "image_sizes", "shift_labels", "output_hidden_state"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                model(**batch, **{name: 1})
        found = model(**batch, output_hidden_states=True, use_cache=False)
        assert len(found.hidden_states) == model.config.text_config.num_hidden_layers + 1
        assert found.past_key_values is None
        values = model(**batch, return_dict=False)
        assert isinstance(values, tuple)
        assert torch.equal(values[0], plain.logits)
        mean = model(**batch, labels=batch["input_ids"])
        shared = model(**batch, labels=batch["input_ids"], num_items_in_batch=torch.tensor(40))
        torch.testing.assert_close(shared.loss * 40, mean.loss * mean.num_supervised)


def test_hidden_states_and_attentions_of_generation(folder, parts):
    batch = inputs_of(batch_of(parts[0], [0], generation=True))
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_hidden_states": True}
    found = model.generate(**batch, **options, output_attentions=True, do_sample=False)
    length = batch["input_ids"].shape[1]
    assert [step[0].shape[1] for step in found.hidden_states] == [length, 1]
    assert found.attentions[0][0].shape[-2:] == (length, length)


def test_arguments_of_the_configuration(folder):
    for name in ("token_per_tile", "bogus"):
        with pytest.raises(ConfigError, match=f"unknown field '{name}'"):
            AlignVLMConfig(**{name: 5})
        with pytest.raises(ConfigError, match=f"configuration.from_pretrained: unknown option '{name}'"):
            AutoConfig.from_pretrained(folder, **{name: 5})
        with pytest.raises(TypeError, match=name):
            AutoModelForImageTextToText.from_pretrained(folder, **{name: 5})
    with pytest.raises(ConfigError, match="did you mean 'tokens_per_tile'"):
        AlignVLMConfig(token_per_tile=5)
    config = AutoConfig.from_pretrained(folder, tokens_per_tile=5, dtype="bfloat16", attn_implementation="eager")
    assert config.tokens_per_tile == 5
    assert str(config.dtype).endswith("bfloat16")
    assert AutoConfig.from_pretrained(folder, return_unused_kwargs=True, bogus=5)[1] == {"bogus": 5}
    saved = config.to_dict()
    assert AlignVLMConfig(**saved).to_dict() == saved
    assert AlignVLMConfig(**saved, of_a_later_release=1).of_a_later_release == 1
    AutoTokenizer.from_pretrained(folder, padding_side="right", use_fast=True)


WRONG_FIELDS = {
    "connector": ("mlp", "connector is 'mlp', expected a mapping, such as {'type': 'align'}"),
    "tiling": ("x", "tiling is 'x', expected a mapping of its settings"),
    "tokens_per_tile": (-3, "tokens_per_tile=-3, expected a whole number of at least 1, below 2^31"),
    "image_token_id": ("x", "image_token_id='x', expected a whole number of at least 0, below 2^31"),
    "vision_feature": ("x", "vision_feature='x' is unknown; known: last, last_normed, penultimate"),
    "text_config": ("x", "text_config is 'x', expected a configuration of transformers or its fields"),
    "vision_config": (5, "vision_config is 5, expected a configuration of transformers or its fields"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_with_an_invalid_value_is_named(folder, name):
    value, message = WRONG_FIELDS[name]
    for load in (AutoConfig, AlignVLMForConditionalGeneration):
        with pytest.raises(ConfigError) as caught:
            load.from_pretrained(folder, **{name: value})
        assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        AlignVLMConfig(**{name: value})
    assert str(caught.value) == message


def test_fields_of_the_parts_and_of_the_file_are_named_in_one_line(tmp_path):
    wrong = {"text_config": "llama", "vision_config": "siglip_vision_model"}
    for name, kind in wrong.items():
        message = rf"^the configuration of '{kind}' is invalid: [^\n]*hidden_size[^\n]*; correct the field$"
        with pytest.raises(ConfigError, match=message):
            AlignVLMConfig(**{name: {"hidden_size": "x"}})
    with pytest.raises(ConfigError, match=r"image_token_id=1000.*, below 2"):
        AlignVLMConfig(image_token_id=10**20)
    with pytest.raises(ConfigError, match=r"config.json holds a list, expected an object of fields"):
        AlignVLMConfig.from_dict([])
    for wrong in (None, "x", ["tokenizer"]):
        with pytest.raises(ConfigError, match=r"processor: tokenizer is of type .*, expected a fast tokenizer of"):
            AlignVLMProcessor(wrong)


@pytest.mark.parametrize("wrong", ["nope", 5, torch.int8, ["float32"]], ids=str)
def test_a_dtype_that_weights_do_not_have_is_named(folder, wrong):
    for name in ("dtype", "torch_dtype"):
        for load in (AutoModelForImageTextToText, AlignVLMForConditionalGeneration):
            with pytest.raises(ConfigError, match=f"{name}=.*known: auto, bfloat16, float16, float32, float64"):
                load.from_pretrained(folder, **{name: wrong})
    for right in ("auto", "bfloat16", torch.bfloat16):
        assert AlignVLMForConditionalGeneration.from_pretrained(folder, dtype=right).dtype.is_floating_point


def test_features_of_images_are_what_stands_at_their_positions(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1]))
    found = model.get_image_features(batch["pixel_values"], batch["tile_boxes"])
    embeds = model.embed(
        batch["input_ids"], batch["pixel_values"], batch["num_tiles"], None, tile_boxes=batch["tile_boxes"]
    ).embeds
    visual = batch["input_ids"] == processor.image_token_id
    torch.testing.assert_close(found.pooler_output.flatten(0, 1), embeds[visual])
    assert found.last_hidden_state.shape[:2] == found.pooler_output.shape[:2]
    features, pooled = model.get_image_features(batch["pixel_values"], batch["tile_boxes"], return_dict=False)
    assert torch.equal(features, found.last_hidden_state)
    assert torch.equal(pooled, found.pooler_output)
    assert model.get_image_features(batch["pixel_values"][:0].float()).pooler_output.shape[0] == 0
    with pytest.raises(DataError, match="pixel_values have shape"):
        model.get_image_features(batch["pixel_values"][0], batch["tile_boxes"])
    with pytest.raises(DataError, match="get_image_features needs pixel_values"):
        model.get_image_features(None)
    tiles = processor.image_processor([picture(120, 60, 0), picture(40, 50, 1)])
    assert torch.equal(tiles["pixel_values"], as_tiles(batch["pixel_values"], batch["tile_boxes"]))
    assert tiles["num_tiles"].tolist() == batch["num_tiles"].tolist()
    assert (processor.image_token, processor.image_token_id) == ("<image>", model.config.image_token_id)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(parts):
    processor, model = parts
    model = copy.deepcopy(model).train()
    batch = inputs_of(batch_of(processor, [0]))
    calls = []
    layer = model.language_model.get_decoder().layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    assert len(calls) == 3  # once, and then once more in the backward pass
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items() if value is not None)
