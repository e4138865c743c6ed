"""Generation looks ids up in the logits, and continues a cache: both with images in the prompt.

LLaVA#836, openvino.genai#4405, transformers#34304: the placeholder's id lies outside of the logits, and modes that
index them by the prompt's ids end in an IndexError. nanoVLM PR#69, transformers PR#30962: an image in the second turn
on a kept cache.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from alignvlm_pl.errors import ConfigError, DataError
from tests.parity.tiny_pages import batch_of, inputs_of, make, picture, tiles_of

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def prompt(parts):
    return inputs_of(batch_of(parts[0], [0], generation=True))


@pytest.fixture(scope="module")
def prompts(parts):
    return inputs_of(batch_of(parts[0], [0, 1, 2], generation=True))


def test_speculative_modes_generate_what_greedy_decoding_does(parts, prompt):
    processor, model = parts
    assert processor.image_token_id >= model.config.text_config.vocab_size  # outside of the logits
    expected = model.generate(**prompt, **GREEDY).tolist()
    assert model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3).tolist() == expected
    assert model.generate(**prompt, **GREEDY, assistant_model=model).tolist() == expected


# Whatever looks the prompt's ids up; some of them in older releases of transformers only.
MODES = [
    {"encoder_repetition_penalty": 1.3},
    {"encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"guidance_scale": 1.5},
    {"num_beams": 2, "repetition_penalty": 1.3, "num_return_sequences": 2},
    {"use_cache": False, "encoder_repetition_penalty": 1.3},
    {"watermarking_config": {"greenlist_ratio": 0.2, "bias": 2.0}},
    {"return_dict_in_generate": True, "output_scores": True, "encoder_repetition_penalty": 1.3},
    {"cache_implementation": "static", "encoder_repetition_penalty": 1.3},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_that_look_ids_up_in_the_logits(parts, prompts, mode):
    found = parts[1].generate(**prompts, **GREEDY, **mode)
    found = found if isinstance(found, torch.Tensor) else found.sequences
    length, copies = prompts["input_ids"].shape[1], mode.get("num_return_sequences", 1)
    assert torch.equal(found[:, :length], prompts["input_ids"].repeat_interleave(copies, dim=0))
    assert found.shape == (3 * copies, length + 8)
    assert int(found[:, length:].max()) < parts[1].config.text_config.vocab_size


STOPPED = [{}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]


@pytest.mark.parametrize("mode", STOPPED, ids=str)
def test_stop_strings_with_the_tokenizer_that_they_need(parts, prompt, mode):
    processor, model = parts
    length = prompt["input_ids"].shape[1]
    free = model.generate(**prompt, **GREEDY | mode)[0, length:]
    stop = next(one for one in processor.tokenizer.decode(free) if one.isascii())
    stopped = model.generate(**prompt, **GREEDY | mode, stop_strings=[stop], tokenizer=processor.tokenizer)[0, length:]
    if "num_beams" in mode:  # the best of all beams need not be one that stopped
        assert len(stopped) <= len(free)
    else:
        assert len(stopped) < len(free)
        assert stop in processor.tokenizer.decode(stopped)


def test_a_penalty_on_the_prompt_has_its_effect(parts, prompt):
    model = parts[1]
    plain = model.generate(**prompt, **{**GREEDY, "max_new_tokens": 1}, encoder_repetition_penalty=1e-6)
    seen = set(prompt["input_ids"][0].tolist())
    assert int(plain[0, -1]) not in seen  # below 1: what the prompt holds is avoided


@pytest.fixture
def padded_by_the_end(parts, monkeypatch):
    """The model with its end of a turn as id of padding, as SmolLM2's."""
    processor, model = parts
    monkeypatch.setattr(model.generation_config, "pad_token_id", processor.end_of_turn_id)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [processor.end_of_turn_id])
    return processor, model


SEEN = [
    {"repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "num_beams": 2},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("mode", SEEN, ids=str)
def test_an_image_adds_no_id_to_those_of_the_prompt(padded_by_the_end, mode):
    """The scores of the text's ids alone are changed, and never those of the end."""
    processor, model = padded_by_the_end
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    options["num_beams"] = mode.get("num_beams", 1)
    for text in ("<image>what?", "why?", "a\n<image>b\n<image>c\n"):
        prompt = processor(images=[[picture(120, 60, 0)] * text.count("<image>")], text=text)
        own = set(prompt["input_ids"].flatten().tolist()) - {processor.image_token_id}
        changed, plain = (model.generate(**prompt, **options | more).scores[0] for more in (mode, {}))
        found = set((changed != plain).any(dim=0).nonzero().flatten().tolist())
        assert found <= own
        assert found == own or "penalty" not in str(mode)


@pytest.mark.parametrize("text", ["<image>what?", "<|im_end|><image>b", "<image>"])
def test_a_custom_processor_sees_the_ids_of_the_text_alone(padded_by_the_end, text):
    processor, model = padded_by_the_end
    prompt, seen = processor(images=picture(120, 60, 0), text=text), []

    def look(ids, scores):
        seen.extend(ids[0].tolist())
        return scores.gather(1, ids).new_zeros(scores.shape)

    model.generate(**prompt, max_new_tokens=1, logits_processor=[look])
    own = prompt["input_ids"][0][prompt["input_ids"][0] != processor.image_token_id].tolist()
    assert len(seen) == prompt["input_ids"].shape[1]
    assert set(seen) == set(own) or not own
    assert seen.count(processor.end_of_turn_id) == own.count(processor.end_of_turn_id)


# Every setting whose ids are looked up in the logits, in every form that it has.
NAMED = [
    ("bad_words_ids", lambda token: [[1], [token]]),
    ("bad_words_ids", lambda token: [[token, 1]]),
    ("sequence_bias", lambda token: {(1, token): 2.0}),
    ("sequence_bias", lambda token: [[[token], -300.0]]),
    ("suppress_tokens", lambda token: [1, token]),
    ("suppress_tokens", lambda token: torch.tensor([1, token])),
    ("suppress_tokens", lambda token: range(token, token + 1)),
    ("begin_suppress_tokens", lambda token: [token]),
    ("forced_bos_token_id", lambda token: token),
    ("forced_eos_token_id", lambda token: token),
    ("forced_eos_token_id", lambda token: [1, token]),
    ("eos_token_id", lambda token: [1, token]),
    ("pad_token_id", lambda token: token),
]


@pytest.mark.parametrize("case", range(len(NAMED)), ids=lambda case: f"{NAMED[case][0]}-{case}")
def test_an_id_that_is_never_generated_is_named(parts, prompt, case, monkeypatch):
    processor, model = parts
    name, form = NAMED[case]
    size = model.config.text_config.vocab_size
    tail = rf", expected ids that can be generated, 0 to {size - 1}; leave it out"
    expected = f"generate: {name} has the image placeholder's id {processor.image_token_id}{tail}"
    given = {name: form(processor.image_token_id)}
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        model.generate(**prompt, **GREEDY | given)
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        model.generate(**prompt, generation_config=GenerationConfig(**given), max_new_tokens=2)
    if name not in ("eos_token_id", "pad_token_id"):  # an end that the LLM does not have is harmless
        with pytest.raises(ConfigError, match=f"{name} has the id {size + 9}{tail}"):
            model.generate(**prompt, **GREEDY, **{name: form(size + 9)})
    monkeypatch.setattr(model.generation_config, name, form(processor.image_token_id))
    if name not in GREEDY:
        with pytest.raises(ConfigError, match=expected):
            model.generate(**prompt, **GREEDY)


def test_an_id_that_a_function_allows_is_named(parts, prompt):
    processor, model = parts
    for ids in ([processor.image_token_id], torch.tensor([1, processor.image_token_id])):
        with pytest.raises(ConfigError, match="prefix_allowed_tokens_fn has the image placeholder's id"):
            model.generate(**prompt, **GREEDY, prefix_allowed_tokens_fn=lambda row, seen, ids=ids: ids)
    found = model.generate(**prompt, **GREEDY, prefix_allowed_tokens_fn=lambda row, seen: [7])
    assert set(found[0, prompt["input_ids"].shape[1] :].tolist()) == {7}


def test_a_streamer_gets_the_prompt_as_it_was_given(parts, prompt):
    put = []
    streamer = SimpleNamespace(put=lambda value: put.append(value.clone()), end=lambda: put.append(None))
    found = parts[1].generate(**prompt, **GREEDY, streamer=streamer)
    assert put[-1] is None
    assert torch.equal(put[0], prompt["input_ids"])
    assert torch.cat([value.flatten() for value in put[:-1]]).tolist() == found[0].tolist()


def test_prompts_and_configurations_of_another_form_are_named(parts, prompt):
    for ids in (prompt["input_ids"][0], prompt["input_ids"][None], prompt["input_ids"][:, :0]):
        with pytest.raises(DataError, match=r"input_ids have shape \(.*\), expected \(rows, tokens\)"):
            parts[1].generate(**prompt | {"input_ids": ids}, **GREEDY)
    with pytest.raises(ConfigError, match="generate: generation_config is a dict, expected a GenerationConfig"):
        parts[1].generate(**prompt, generation_config={"max_new_tokens": 2})


@pytest.mark.parametrize("case", range(len(NAMED)), ids=lambda case: f"{NAMED[case][0]}-{case}")
def test_an_id_of_the_vocabulary_is_taken(parts, prompt, case):
    name, form = NAMED[case]
    parts[1].generate(**prompt, **GREEDY | {name: form(parts[1].config.text_config.vocab_size - 1)})


def test_a_prompt_without_a_mask_sees_its_images(parts, prompt):
    model = parts[1]
    given = {name: value for name, value in prompt.items() if name != "attention_mask"}
    assert model.generate(**given, **GREEDY).tolist() == model.generate(**prompt, **GREEDY).tolist()


@pytest.mark.parametrize("name", ["assistant_early_exit", "prefill_chunk_size", "token_healing"])
def test_modes_that_cut_a_prompt_are_refused_by_name(parts, prompt, name):
    with pytest.raises(ConfigError, match=f"generate: {name} is not supported"):
        parts[1].generate(**prompt, **GREEDY, **{name: 1})


def second_turn(parts, batch, sequences, sizes, *, only_new):
    """The batch of a conversation that continues with an image of one tile in each row."""
    processor, _ = parts
    rows = []
    for row, size in enumerate(sizes):
        new = processor(images=picture(*size, row + 9), text="<|im_end|>\n<image>and here?")
        rows.append((new["input_ids"], new["pixel_values"]))
    ids = torch.cat([sequences, torch.cat([ids for ids, _ in rows])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, batch["attention_mask"].shape[1] :])], dim=1)
    old = torch.split(tiles_of(batch), batch["num_tiles"].tolist())
    tiles = [new if only_new else torch.cat([before, new]) for before, (_, new) in zip(old, rows, strict=True)]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(tiles),
        "num_tiles": torch.tensor([len(one) for one in tiles]),
    }


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_second_turn_with_a_new_image_on_a_kept_cache(parts, prompt, prompts, only_new, several):
    model = parts[1]
    batch, sizes = (prompts, [(50, 50), (40, 56), (56, 30)]) if several else (prompt, [(50, 50)])
    first = model.generate(
        **batch, **GREEDY, past_key_values=DynamicCache(config=model.config.text_config), return_dict_in_generate=True
    )
    whole = second_turn(parts, batch, first.sequences, sizes, only_new=False)
    expected = model.generate(**whole, **GREEDY)
    given = second_turn(parts, batch, first.sequences, sizes, only_new=only_new)
    found = model.generate(**given, **GREEDY, past_key_values=first.past_key_values)
    assert found.tolist() == expected.tolist()
    other = second_turn(parts, batch, first.sequences, [(56, 56)] * len(sizes), only_new=False)
    assert model.generate(**other, **GREEDY).tolist() != expected.tolist()  # the new image matters


def test_tiles_that_are_neither_all_nor_the_new_ones_are_named(parts, prompt):
    model = parts[1]
    first = model.generate(
        **prompt, **GREEDY, past_key_values=DynamicCache(config=model.config.text_config), return_dict_in_generate=True
    )
    given = second_turn(parts, prompt, first.sequences, [(50, 50)], only_new=False)
    tiles = len(prompt["pixel_values"])
    given["pixel_values"] = torch.cat([given["pixel_values"]] * 2)
    with pytest.raises(DataError, match=rf"a cache with {tiles} tiles in it and has 1 new ones, but pixel_values has"):
        model.generate(**given, **GREEDY, past_key_values=first.past_key_values)
