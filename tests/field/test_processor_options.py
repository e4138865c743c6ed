"""The processor honours each option that transformers hands it, or refuses it by name.

transformers PR#30962 and its thread (padding side, truncation), LLaVA-NeXT#169: options that were taken and ignored.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import TOKENS_PER_TILE, tiny_spec

IMAGE = Image.fromarray(np.zeros((40, 90, 3), np.uint8))
CHAT = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "x" * 300}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor(tiny_spec(folder / "tokenizer")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def grouped(options):
    """The same options flat, and in transformers' groups."""
    groups = {"images_kwargs": {}, "text_kwargs": {}}
    for name, value in options.items():
        groups["images_kwargs" if name in ("max_tiles", "thumbnail") else "text_kwargs"][name] = value
    return [options, groups]


def calls(processor, options, text="<image>" + "x" * 300):
    """The batches of every way by which options reach the processor."""
    for given in grouped(options):
        yield processor(images=IMAGE, text=text, **given)
        yield processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, **given)
        yield processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs=given)


def test_truncation_cuts_text_and_no_visual_token(processor):
    tiles = int(processor(images=IMAGE, text="<image>")["num_tiles"])
    for options in ({"truncation": True, "max_length": 80}, {"max_length": 80}):
        for batch in calls(processor, options):
            assert batch["input_ids"].shape == (1, 80)
            assert int((batch["input_ids"] == processor.image_token_id).sum()) == tiles * TOKENS_PER_TILE
    with pytest.raises(ConfigError, match=r"max_length=40 is less than the 48 visual tokens"):
        processor(images=IMAGE, text="<image>" + "x" * 300, truncation=True, max_length=40)
    long = processor(images=IMAGE, text="<image>" + "x" * 300, truncation=False, max_length=80)
    assert long["input_ids"].shape[1] > 300


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor, side):
    texts = ["<image>" + "x" * 9, "xx"]
    length = TOKENS_PER_TILE * 3 + 9
    found = processor(images=[[IMAGE], []], text=texts, padding=True, padding_side=side)
    assert found["input_ids"].shape == (2, length)
    assert found["attention_mask"][1, 0 if side == "right" else -1] == 1
    assert int(found["attention_mask"][1].sum()) == 2
    for batch in calls(processor, {"padding": "max_length", "max_length": 400, "padding_side": side}):
        assert batch["input_ids"].shape == (1, 400)
        assert batch["attention_mask"][0, -1 if side == "left" else 0] == 1
    for batch in calls(processor, {"pad_to_multiple_of": 64}):
        assert batch["input_ids"].shape[1] % 64 == 0
    with pytest.raises(ConfigError, match=r"padding=False and rows of 2 to \d+ tokens"):
        processor(images=[[IMAGE], []], text=texts, padding=False)
    ragged = processor(images=[[IMAGE], []], text=texts, padding=False, return_tensors=None)
    assert [len(row) for row in ragged["input_ids"]] == [length, 2]


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_return_tensors(processor, kind):
    expected = {"pt": torch.Tensor, "np": np.ndarray, None: list}[kind]
    for batch in calls(processor, {"return_tensors": kind}):
        assert {type(value) for value in batch.values()} == {expected}
    reference = processor(images=IMAGE, text="<image>a")
    found = processor(images=IMAGE, text="<image>a", return_tensors=kind)
    np.testing.assert_array_equal(np.asarray(found["pixel_values"]), reference["pixel_values"].numpy())
    assert np.asarray(found["input_ids"]).tolist() == reference["input_ids"].tolist()


def test_tiling_of_one_call(processor):
    for batch in calls(processor, {"max_tiles": 1}):
        assert batch["num_tiles"].tolist() == [1]
        assert int((batch["input_ids"] == processor.image_token_id).sum()) == TOKENS_PER_TILE
    for batch in calls(processor, {"thumbnail": "none"}):
        assert batch["num_tiles"].tolist() == [2]
    assert processor(images=IMAGE, text="<image>")["num_tiles"].tolist() == [3]


REFUSED = [
    {"colour": "red"},
    {"paddding": True},
    {"padding": "longets"},
    {"padding": "max_length"},
    {"padding_side": "middle"},
    {"truncation": "only_second", "max_length": 80},
    {"max_length": -1},
    {"max_length": "80"},
    {"max_length": True},
    {"max_length": 80.5},
    {"max_length": np.array([80])},
    {"pad_to_multiple_of": np.bool_(True)},
    {"return_attention_mask": "no"},
    {"do_resize": np.array([True, False])},
    {"return_tensors": "tf"},
    {"return_tensors": "torch"},
    {"add_special_tokens": True},
    {"return_offsets_mapping": True},
    {"return_mm_token_type_ids": True},
    {"do_resize": False},
    {"do_normalize": False},
    {"size": {"height": 5}},
    {"tile_height": 28},
    {"max_tiles": 0},
    {"thumbnail": "middle"},
]


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_an_option_that_is_not_honoured_is_named(processor, options):
    name = min(options) if "truncation" not in options else "truncation"
    for given in grouped(options):
        for call in (
            lambda given: processor(images=IMAGE, text="<image>", **given),
            lambda given: processor.apply_chat_template(CHAT, tokenize=True, **given),
            lambda given: processor.apply_chat_template(CHAT, tokenize=True, processor_kwargs=given),
        ):
            with pytest.raises(ConfigError, match=name) as caught:
                call(given)
            assert len(str(caught.value)) <= 300


def test_scalars_of_numpy_and_torch_are_numbers(processor):
    for kind in (int, np.int64, np.uint16, np.array, torch.tensor):
        for batch in calls(processor, {"padding": "max_length", "max_length": kind(400), "max_tiles": kind(1)}):
            assert batch["input_ids"].shape == (1, 400)
            assert batch["num_tiles"].tolist() == [1]
    own = AlignVLMProcessor(processor.tokenizer, tiling={"max_tiles": np.int64(3), "max_side": np.int32(2)})
    assert '"max_tiles": 3' in own.to_json_string()
    for no in (False, np.bool_(False)):
        for batch in calls(processor, {"return_attention_mask": no}):
            assert "attention_mask" not in batch


@pytest.mark.parametrize("wrong", ["x", ["max_tiles"], 0, False, 5])
def test_groups_that_are_none(processor, wrong):
    for group in ("images_kwargs", "text_kwargs", "common_kwargs", "videos_kwargs", "audio_kwargs"):
        for call in (
            lambda given: processor(images=IMAGE, text="<image>", **given),
            lambda given: processor.apply_chat_template(CHAT, tokenize=True, **given),
            lambda given: processor.apply_chat_template(CHAT, processor_kwargs=given),
        ):
            with pytest.raises(ConfigError, match=f"{group} is of type {type(wrong).__name__}, expected a dict"):
                call({group: wrong})
    with pytest.raises(ConfigError, match="processor_kwargs is of type"):
        processor.apply_chat_template(CHAT, processor_kwargs=wrong)


def test_groups(processor):
    with pytest.raises(ConfigError, match="videos_kwargs is not supported"):
        processor(images=IMAGE, text="<image>", videos_kwargs={"fps": 1})
    with pytest.raises(ConfigError, match="padding is given twice"):
        processor(images=IMAGE, text="<image>", padding=True, text_kwargs={"padding": "max_length"})
    for given in ({"videos": [IMAGE]}, {"audio": [0.0]}):
        with pytest.raises(ConfigError, match="videos and audio are not supported"):
            processor(images=IMAGE, text="<image>", **given)
    for text in (None, 5, [], [5], IMAGE):
        with pytest.raises(ConfigError, match="text must be a string"):
            processor(images=IMAGE, text=text)


def test_what_transformers_passes_by_itself_has_no_effect(processor):
    given = {"padding": None, "truncation": None, "max_length": None, "verbose": False, "do_convert_rgb": True}
    plain = processor(images=IMAGE, text="<image>a")
    found = processor(images=IMAGE, text="<image>a", add_special_tokens=False, return_token_type_ids=False, **given)
    assert found["input_ids"].tolist() == plain["input_ids"].tolist()


def test_options_of_apply_chat_template(processor):
    chat = [*CHAT, {"role": "assistant", "content": "seven"}]
    whole = processor.apply_chat_template(chat)
    assert processor.apply_chat_template(chat, continue_final_message=True) == whole.removesuffix("<|im_end|>\n")
    for tokenize in (False, True):
        with pytest.raises(ConfigError, match="continue_final_message excludes"):
            processor.apply_chat_template(
                chat, continue_final_message=True, add_generation_prompt=True, tokenize=tokenize
            )
        for name in ("tools", "documents"):
            with pytest.raises(ConfigError, match=f"{name} is not supported"):
                processor.apply_chat_template(chat, **{name: [{"a": 1}]}, tokenize=tokenize)
        with pytest.raises(ConfigError, match="unknown option 'colour'"):
            processor.apply_chat_template(chat, colour="red", tokenize=tokenize)
    found = processor.apply_chat_template(chat, tokenize=True, return_assistant_tokens_mask=True)
    kept = found["input_ids"][found["assistant_masks"].bool()]
    assert processor.tokenizer.decode(kept) == "seven<|im_end|>"
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert torch.equal(ids, found["input_ids"])
    for given in ({"tokenize": False}, {"tokenize": True, "return_dict": False}):
        with pytest.raises(ConfigError, match="return_assistant_tokens_mask needs tokenize=True"):
            processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **given)
    with pytest.raises(ConfigError, match="padding is given twice, by itself and in processor_kwargs"):
        processor.apply_chat_template(chat, padding=True, processor_kwargs={"padding": "max_length"}, tokenize=True)


# Words of the template, of its text and of its functions; and what is handed to it anyhow.
UNKNOWN = ["role", "message", "content", "assistant", "im_start", "messages", "loop", "endfor", "strftime_now", "user"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_word_of_the_template_is_no_variable(processor, name):
    generation = "{% generation %}{{ mark }}{% endgeneration %}{% for x in [1] %}{% break %}{% endfor %}"
    for template in (None, "{# assistant #}" + processor.chat_template, generation + processor.chat_template):
        for tokenize in (False, True):
            with pytest.raises(ConfigError, match=f"unknown option '{name}'"):
                processor.apply_chat_template(CHAT, chat_template=template, tokenize=tokenize, **{name: "x"})


def test_variables_of_the_template(processor):
    def start(text, **given):
        found = processor.apply_chat_template(CHAT, chat_template=text + processor.chat_template, **given)
        return found.split("<|im_start|>")[0]

    assert start("{{ greeting }}", greeting="hi") == "hi"
    assert start("{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}", date="then") == "then"
    assert start("{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}") == "today"
    assert start("{{ names | join }}{{ turns }}", names=["a", "b"], turns=2) == "ab2"
    assert [start("{{ flag }}", flag=value) for value in (1, True, 1.0)] == ["1", "True", "1.0"]
    assert start("{% generation %}{{ mark }}{% endgeneration %}", mark="m") == "m"
    for wrong in (5, {"default": "{{ a }}"}, ["chatml"], "chat"):
        with pytest.raises(ConfigError, match="is neither a Jinja template nor the name of one"):
            processor.apply_chat_template(CHAT, chat_template=wrong)
    with pytest.raises(ConfigError, match=r"the chat template is not valid Jinja: .*; correct chat_template"):
        start("{% if %}", flag=1)


MALFORMED = {
    "one message": (CHAT[0], "the conversation is of type dict, expected a list of messages"),
    "text": ("what?", "the conversation is of type str, expected"),
    "nothing": (None, "the conversation is of type NoneType"),
    "number": (5, "the conversation is of type int"),
    "empty": ([], "has no messages"),
    "texts": (["what?"], "a message must be a mapping"),
    "one of a batch": ([CHAT, CHAT[0]], "a message must be a mapping"),
    "batch in a conversation": ([CHAT[0], CHAT], "a message must be a mapping"),
    "one part": ([{"role": "user", "content": {"type": "text", "text": "a"}}], "message content of type dict"),
    "number as content": ([{"role": "user", "content": 5}], "message content of type int, expected"),
    "number as text": ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "part is of type int"),
    "part of text": ([{"role": "user", "content": ["a"]}], "content part of type 'a'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_conversation_of_another_form_is_named(processor, case):
    conversation, message = MALFORMED[case]
    for tokenize in (False, True):
        with pytest.raises(DataError, match=message):
            processor.apply_chat_template(conversation, tokenize=tokenize)


def test_options_of_from_pretrained(folder, processor):
    loaded = AlignVLMProcessor.from_pretrained(folder, tiling={"max_tiles": 2})
    assert loaded.tiling == {**processor.tiling, "max_tiles": 2}
    right = AutoProcessor.from_pretrained(folder, padding_side="right")
    assert right(images=[[IMAGE], []], text=["<image>", "xx"])["attention_mask"][1, 0] == 1
    for load in (AutoProcessor, AlignVLMProcessor):
        with pytest.raises(ConfigError, match=r"from_pretrained: unknown option 'tilling'; did you mean 'tiling'"):
            load.from_pretrained(folder, tilling={"max_tiles": 2})
    with pytest.raises(TypeError, match="colour"):
        AlignVLMProcessor(processor.tokenizer, colour="red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiling": "x"}, "tiling is 'x', expected a mapping of its settings"),
        ({"tokens_per_tile": "x"}, "tokens_per_tile='x', expected a whole number of at least 1, below 2^31"),
        ({"spell_answers": "x"}, "spell_answers='x', expected true or false"),
    ],
)
def test_fields_of_the_processor_with_an_invalid_value(folder, options, message):
    with pytest.raises(ConfigError) as caught:
        AlignVLMProcessor.from_pretrained(folder, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("ids", "shown"), [([1, -100], "-100"), ([[1], [-1]], "-1"), ([1.5], "1.5"), ([10**12], "10"), ([None], "None")]
)
def test_what_is_no_id_is_not_decoded(processor, ids, shown):
    message = rf"the id {shown}\d* is no token; before decoding replace -100, .* by pad_token_id"
    decode = (processor.decode, processor.batch_decode, processor.post_process_image_text_to_text)
    for function in decode:
        with pytest.raises(DataError, match=message):
            function(ids)
    with pytest.raises(DataError, match="the id -100 is no token"):
        processor.batch_decode(torch.tensor([[5, -100]]))


def test_decoding_has_the_options_of_the_tokenizer(processor):
    ids = [processor.tokenizer("a b")["input_ids"] + [processor.end_of_turn_id]]
    for given in (ids, torch.tensor(ids), np.array(ids)):
        assert processor.batch_decode(given, skip_special_tokens=True) == ["a b"]
        assert processor.decode(given[0]) == "a b<|im_end|>"
    for function in (processor.decode, processor.batch_decode):
        with pytest.raises(TypeError, match="unexpected keyword argument 'skip_special_token'"):
            function(ids[0], skip_special_token=True)


def test_nan_is_given_once(processor):
    for options in ({"images_kwargs": {"max_tiles": float("nan")}}, {"max_tiles": float("nan")}):
        with pytest.raises(ConfigError, match="max_tiles must be a whole number from 1 to 256, found nan"):
            processor(text="<image>", images=IMAGE, **options)
    with pytest.raises(ConfigError, match="max_tiles is given twice, as 2 and in images_kwargs as 3"):
        processor(text="<image>", images=IMAGE, max_tiles=2, images_kwargs={"max_tiles": 3})


@pytest.mark.parametrize(
    "name",
    ["add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenize", "return_dict"],
)
def test_a_switch_is_true_or_false(processor, name):
    for wrong in ("false", 1, [True]):
        with pytest.raises(ConfigError, match=f"apply_chat_template: {name}=.*, expected true or false"):
            processor.apply_chat_template(CHAT, **{name: wrong})
    assert processor.apply_chat_template(CHAT, continue_final_message="content").endswith("xxx")


@pytest.mark.parametrize(
    "options", [{"padding": "max_length", "max_length": 10**12}, {"pad_to_multiple_of": 10**12}], ids=str
)
def test_rows_are_padded_to_what_memory_holds(processor, options):
    name = list(options)[-1]
    with pytest.raises(ConfigError, match=f"rows padded to {name}=1000000000000, expected at most 16777216 tokens"):
        processor(text="a", **options)
    assert processor(text="a", max_length=10**30)["input_ids"].shape == (1, 1)


FAULTY = [
    "{{ [1] | xmlattr }}",
    "{{ 1 // 0 }}",
    "{{ range(10**9) }}",
    "{{ {}['a'].b }}",
    "{{ 'a' * 2.5 }}",
    "{{ '%q' % 1 }}",
]


@pytest.mark.parametrize("text", FAULTY)
def test_a_template_with_a_fault_of_its_own_is_named(processor, text):
    with pytest.raises(
        DataError, match=r"the chat template does not render a conversation of the roles user: .*; change"
    ):
        processor.apply_chat_template(CHAT, chat_template=text + processor.chat_template)
