"""The model against Hugging Face's own parts on random tiny configurations, and its life in their format."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from alignvlm_pl.errors import DataError
from alignvlm_pl.models import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm_pl.models.losses import supervised_cross_entropy
from tests.parity.tiny_pages import (
    SAMPLES,
    batch_of,
    encode,
    greedy_without_cache,
    inputs_of,
    make,
    tiles_of,
)

FEATURES = ("last_normed", "last", "penultimate")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"), connector={"type": "align", "gain_init": 3.0})


def test_llm_path_equals_llama(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1])
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], tiles_of(batch), batch["num_tiles"], None).embeds
        expected = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        found = model(**inputs_of(batch)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        last = model(**inputs_of(batch), logits_to_keep=2).logits
        torch.testing.assert_close(last, expected[:, -2:], rtol=0, atol=1e-5)
        given = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_text_embeddings_are_untouched(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1])
    embeds, log_probs, _ = model.embed(
        batch["input_ids"],
        batch["pixel_values"],
        batch["num_tiles"],
        torch.tensor([3, 5]),
        tile_boxes=batch["tile_boxes"],
    )
    text = batch["input_ids"] != model.config.image_token_id
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(embeds[text], table[batch["input_ids"][text]], rtol=0, atol=0)
    expected = model.connector(model.encode_images(tiles_of(batch)), table).embeds
    torch.testing.assert_close(embeds[~text], expected.flatten(0, 1), rtol=0, atol=0)
    read = model.read(tiles_of(batch), torch.tensor([3, 5]))
    torch.testing.assert_close(log_probs, read, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_batched_generation_equals_uncached_forward_of_each_sample(parts, cached):
    processor, model = parts
    steps = 6
    batch = batch_of(processor, [0, 1, 2], generation=True)
    assert len({int(n) for n in batch["attention_mask"].sum(1)}) == 3  # padding is at work
    out = model.generate(
        **inputs_of(batch),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        use_cache=cached,
        eos_token_id=[],
    )
    found = out[:, batch["input_ids"].shape[1] :]
    answers = set()
    for row in range(3):
        single = batch_of(processor, [row], generation=True)
        expected = greedy_without_cache(model, single, steps)[0]
        assert found[row].tolist() == expected.tolist()
        answers.add(tuple(expected.tolist()))
    assert len(answers) == 3


def test_the_image_matters(parts):
    processor, model = parts
    batch = batch_of(processor, [0], generation=True)
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits[:, -1]
        other = model(**{**inputs_of(batch), "pixel_values": 255 - batch["pixel_values"]}).logits[:, -1]
    assert float((logits - other).abs().max()) > 1e-2


def test_generation_stops_at_the_end_of_turn(parts):
    processor, model = parts
    assert model.generation_config.eos_token_id == processor.end_of_turn_id
    assert model.generation_config.pad_token_id == processor.pad_token_id


def test_a_second_turn_continues_from_the_cache(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0], generation=True))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    first = model.generate(**batch, **options, return_dict_in_generate=True)
    more = torch.tensor([processor.tokenizer("And?")["input_ids"]])
    ids = torch.cat([first.sequences, more], dim=1)
    batch = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**batch, **options)
    found = model.generate(**batch, **options, past_key_values=first.past_key_values)
    assert found.tolist() == expected.tolist()


def test_beams_continue_the_prompt_of_their_sample(parts):
    processor, model = parts
    options = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": [],
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    batch = batch_of(processor, [0, 1, 2], generation=True)
    found = model.generate(**inputs_of(batch), **options)
    for row in range(3):
        single = batch_of(processor, [row], generation=True)
        expected = model.generate(**inputs_of(single), **options)
        assert found.sequences[row, -4:].tolist() == expected.sequences[0, -4:].tolist()
        # Scores tell tiles in a wrong order from the right one even where the words are the same.
        torch.testing.assert_close(found.sequences_scores[row], expected.sequences_scores[0], rtol=0, atol=1e-5)


def test_loss_equals_cross_entropy_of_all_logits(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1, 2])
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits
        output = model(**inputs_of(batch), labels=batch["labels"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    # float32; the head sees the same rows in another batch. Measured worst case 1e-6 relative.
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss_sum / output.num_supervised, output.loss)
    answers = [SAMPLES[index][1] for index in range(3)]
    assert int(output.num_supervised) == sum(len(answer) + 1 for answer in answers)


def test_padding_side_does_not_change_the_loss(parts):
    processor, model = parts
    items = [encode(processor, index) for index in (0, 1)]
    losses = []
    for pad_left in (False, True):
        batch = processor.collate(items, pad_left=pad_left)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            losses.append(model(**inputs_of(batch), labels=batch["labels"], position_ids=positions).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connector", ["align", "mlp"])
def test_save_and_load_bit_exact(tmp_path, tied, connector):
    options = {"type": connector, **({"gain_init": 3.0, "vocab_rows": 100} if connector == "align" else {})}
    processor, model = make(tmp_path / "tokenizer", tied=tied, connector=options, vision_feature="last")
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is left at its start
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(config) is AlignVLMConfig
    assert config.to_dict()["connector"] == options
    assert (config.vision_feature, config.tokens_per_tile, config.tiling) == ("last", 16, model.config.tiling)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(loaded) is AlignVLMForConditionalGeneration
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert shared == tied
    assert loaded.generation_config.eos_token_id == processor.end_of_turn_id
    second = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(second) is AlignVLMProcessor
    batch = batch_of(second, [0, 1], generation=True)
    outs = [m.generate(**inputs_of(batch), max_new_tokens=4, do_sample=False) for m in (model, loaded.eval())]
    assert torch.equal(*outs)


def test_a_fresh_model_starts_with_the_configured_gain(tmp_path):
    _, model = make(tmp_path, connector={"type": "align", "gain_init": 5.0}, sharp=False)
    assert bool((model.connector.norm2.weight == 5).all())
    again = AlignVLMForConditionalGeneration(copy.deepcopy(model.config))
    assert bool((again.connector.norm2.weight == 5).all())
    assert torch.equal(again.connector.w2.weight, again.get_output_embeddings().weight)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(tmp_path, feature, tied):
    processor, model = make(tmp_path, vision_feature=feature, tied=tied)
    batch = batch_of(processor, [0, 1])
    model(**inputs_of(batch), labels=batch["labels"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # A key's bias shifts all scores of a row alike and has no effect on the softmax: its gradient is rounding at most.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_hidden_states_of_the_complete_siglip(tmp_path, feature):
    processor, model = make(tmp_path, vision_feature=feature)
    full = AutoModel.from_config(model.config.vision_config).eval()
    mine = dict(model.vision_tower.state_dict())
    missing = full.load_state_dict(mine, strict=False)
    assert missing.unexpected_keys == []
    pixels = tiles_of(batch_of(processor, [0]))
    with torch.no_grad():
        output = full(pixel_values=pixels, output_hidden_states=True)
        expected = {
            "last_normed": output.last_hidden_state,
            "last": output.hidden_states[-1],
            "penultimate": output.hidden_states[-2],
        }[feature]
        torch.testing.assert_close(model.encode_images(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model_type", ["clip_vision_model", "vit", "dinov2"])
def test_other_towers_have_no_idle_parameter(tmp_path, feature, model_type):
    vision = {"model_type": model_type}
    processor, model = make(tmp_path, vision=vision, vision_feature=feature)
    assert processor.tokens_per_tile == 17  # these have a class token
    batch = batch_of(processor, [0])
    model(**inputs_of(batch), labels=batch["labels"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_num_tiles_mismatch_names_sample_and_counts(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [1, 0]))
    batch["num_tiles"] = torch.tensor([2, 2])
    with pytest.raises(DataError, match=r"sample 0 .* has 16 image placeholders but its 2 tiles give 32 visual tokens"):
        model(**batch)
    batch["pixel_values"] = None
    with pytest.raises(DataError, match="64 image placeholders but no pixel_values"):
        model(**batch)


@pytest.mark.parametrize("generation", [False, True])
def test_uint8_tiles_give_the_bits_of_normalised_ones_and_need_their_boxes(parts, generation):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0, 1, 2], generation=generation))
    given = {**batch, "pixel_values": tiles_of(batch), "tile_boxes": None}
    columns = torch.tensor([3, 5])
    with torch.no_grad():
        if generation:
            options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "output_scores": True}
            found, expected = (
                model.generate(**inputs, **options, return_dict_in_generate=True) for inputs in (batch, given)
            )
            assert found.sequences.tolist() == expected.sequences.tolist()
            assert all(map(torch.equal, found.scores, expected.scores))
        else:
            assert torch.equal(model(**batch).logits, model(**given).logits)
        found = model.read(batch["pixel_values"], columns, tile_boxes=batch["tile_boxes"])
        assert torch.equal(found, model.read(given["pixel_values"], columns))
    with pytest.raises(DataError, match="pixel_values is uint8 but there are no tile_boxes"):
        model(**{**batch, "tile_boxes": None})
    with pytest.raises(DataError, match="pixel_values is uint8 but there are no tile_boxes"):
        model.read(batch["pixel_values"], columns)


def test_tokens_per_tile_mismatch(parts):
    processor, model = parts
    batch = batch_of(processor, [1])
    other = copy.deepcopy(model)
    other.config.tokens_per_tile = 9
    with pytest.raises(DataError, match=r"gave 16 tokens for a tile of \(56, 56\) px, config.tokens_per_tile is 9"):
        other(**inputs_of(batch))


def test_text_only_batch(parts):
    processor, model = parts
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    batch = processor.collate([processor.encode(messages, [])])
    with torch.no_grad():
        found = model(**inputs_of(batch)).logits
        expected = model.language_model(batch["input_ids"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def text_item(processor, answer="a"):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return processor.encode(messages, [])


@pytest.mark.parametrize("connector", ["align", "mlp"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_text_only_batch_gives_every_trained_parameter_a_gradient(tmp_path, feature, connector):
    """Zeros where an image would have reached, so that ranks with and without images agree; the loss is the LLM's."""
    processor, model = make(tmp_path, vision_feature=feature, connector={"type": connector})
    batch = processor.collate([text_item(processor)])
    expected, _, *_ = supervised_cross_entropy(
        model.language_model.get_decoder()(batch["input_ids"]).last_hidden_state,
        batch["labels"],
        model.get_output_embeddings(),
    )
    for frozen in ((), (model.vision_tower,), (model.vision_tower, model.connector)):
        model.requires_grad_(True).zero_grad()
        for part in frozen:
            part.requires_grad_(False)
        output = model(**inputs_of(batch), labels=batch["labels"])
        assert torch.equal(output.loss_sum, expected)
        output.loss_sum.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad and not name.startswith("language_model"):
                assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_text_only_batches_read_nothing(parts):
    processor, model = parts
    batch = processor.collate([text_item(processor)])
    columns = torch.tensor([3, 5])
    found = model.read(batch["pixel_values"], columns, tile_boxes=batch["tile_boxes"])
    assert found.shape == (0, 16, 2)
    model.zero_grad()
    found.sum().backward()
    assert all(p.grad is not None for p in model.vision_tower.parameters())
    output = model(**inputs_of(batch), labels=batch["labels"], readout_columns=columns)
    assert output.readout_log_probs.shape == (0, 16, 2)


def test_mixed_batches_equal_each_sample_alone(parts):
    processor, model = parts
    items = [text_item(processor), encode(processor, 0), text_item(processor, "three"), encode(processor, 1)]
    batch = processor.collate(items)
    assert batch["num_tiles"].tolist()[::2] == [0, 0]
    with torch.no_grad():
        found = model(**inputs_of(batch), labels=batch["labels"])
        singles = [processor.collate([item]) for item in items]
        alone = [model(**inputs_of(one), labels=one["labels"]).loss_sum for one in singles]
    # float32; measured worst case 1e-7 relative.
    torch.testing.assert_close(found.document_loss_sums, torch.stack(alone), rtol=1e-5, atol=0)


def test_a_batch_without_supervised_tokens_has_the_loss_zero_and_gradients_of_zero(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1])
    model.zero_grad()
    output = model(**inputs_of(batch), labels=torch.full_like(batch["labels"], -100))
    assert (float(output.loss.detach()), float(output.num_supervised)) == (0, 0)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_bfloat16_takes_float32_pixels(parts):
    processor, model = parts
    half = copy.deepcopy(model).bfloat16()
    batch = batch_of(processor, [0, 1])
    with torch.no_grad():
        loss = half(**inputs_of(batch), labels=batch["labels"]).loss
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())


@pytest.mark.parametrize("full", [False, True])
def test_the_pipeline_of_transformers_answers_a_chat(parts, tmp_path, full):
    from PIL import Image
    from transformers import pipeline

    processor, model = parts
    Image.new("RGB", (60, 40), "white").save(tmp_path / "page.png")
    content = [{"type": "image", "url": str(tmp_path / "page.png")}, {"type": "text", "text": "Total?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    settings = {"max_new_tokens": 6, "do_sample": False}
    ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    (expected,) = processor.post_process_image_text_to_text(ids)
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    found = answer(text=chat, return_full_text=full, generate_kwargs=settings)[0]["generated_text"]
    assert (found[-1]["content"] if full else found).strip() == expected
    assert expected
