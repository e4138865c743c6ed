"""The processor honours each option that transformers hands it, or refuses it by name.

transformers PR#30962 and its thread (padding side, truncation), LLaVA-NeXT#169: options that were taken and ignored.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from alignvlm_pl.errors import ConfigError
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
    template = "{{ greeting }}" + processor.chat_template
    assert processor.apply_chat_template(CHAT, chat_template=template, greeting="hi").startswith("hi<|im_start|>")


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
