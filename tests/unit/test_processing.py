"""Processor: encoding, padding, the Hugging Face entry points, saving and loading."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.pixels import cut_tiles, normalise_tensor
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import TOKENS_PER_TILE, VOCAB_SIZE, tiny_spec, tiny_tokenizer
from alignvlm_pl.preprocessing.chat import IGNORE_INDEX
from alignvlm_pl.preprocessing.tiling import count_visual_tokens


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return build_processor(tiny_spec(tmp_path_factory.mktemp("tokenizer")))


def picture(width=150, height=60, value=0):
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


def ask(*images, text="Total?", answer=None):
    parts = [{"type": "image", **({"image": image} if image is not None else {})} for image in images]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def visual(processor, encoded):
    """Number of visual positions."""
    return int((encoded.input_ids == processor.image_token_id).sum())


def normalised(encoded):
    return normalise_tensor(torch.from_numpy(encoded.pixels), torch.from_numpy(encoded.tile_boxes))


def test_encode(processor):
    images = [picture(), picture(40, 40, 255)]
    encoded = processor.encode(ask(None, None, answer="7"), images)
    counts = [count_visual_tokens(*image.size, processor.geometry, TOKENS_PER_TILE) for image in images]
    assert counts[0] > counts[1] == TOKENS_PER_TILE
    assert visual(processor, encoded) == sum(counts) == encoded.num_tiles * TOKENS_PER_TILE
    assert processor.image_token_id == VOCAB_SIZE  # outside the LLM's table
    expected = torch.cat([cut_tiles(image, processor.geometry) for image in images])
    assert torch.equal(normalised(encoded), expected)
    assert (encoded.pixels.dtype, encoded.tile_boxes.shape) == (np.uint8, (encoded.num_tiles, 4))
    answer = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(answer) == "7<|im_end|>"
    assert not encoded.truncated


def test_images_take_their_length_where_they_are_and_no_loss(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]
    encoded = processor.encode(asked, [picture(), picture(40, 40)])
    lengths = [count_visual_tokens(*size, processor.geometry, TOKENS_PER_TILE) for size in (picture().size, (40, 40))]
    marks = "".join("I" if token == processor.image_token_id else "t" for token in encoded.input_ids)
    assert marks.strip("t") == "I" * lengths[0] + "t" + "I" * lengths[1]
    labels = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == "7<|im_end|>"
    assert (encoded.input_ids[encoded.labels != IGNORE_INDEX] == labels).all()


def test_generation_is_the_same_prompt_without_the_answer(processor):
    prompt = processor.encode(ask(None), [picture()], generation=True)
    full = processor.encode(ask(None, answer="7"), [picture()])
    first = next(i for i, label in enumerate(full.labels) if label != IGNORE_INDEX)
    assert prompt.input_ids.tolist() == full.input_ids[:first].tolist()
    assert set(prompt.labels.tolist()) == {IGNORE_INDEX}


def test_text_only(processor):
    encoded = processor.encode(ask(answer="7"), [])
    assert encoded.pixels.shape == (0, 3, 56, 56)
    assert encoded.num_tiles == 0
    batch = processor.collate([encoded, processor.encode(ask(None, answer="7"), [picture(30, 30)])])
    assert batch["num_tiles"].tolist() == [0, 1]


def test_truncation_keeps_every_visual_token(processor):
    full = processor.encode(ask(None, answer="x" * 50), [picture()])
    cut = processor.encode(ask(None, answer="x" * 50), [picture()], max_text_length=50)
    assert cut.truncated
    assert visual(processor, cut) == visual(processor, full)
    assert len(cut.input_ids) == visual(processor, full) + 50
    with pytest.raises(DataError, match=r"no supervised token.*max_text_length=5"):
        processor.encode(ask(None, answer="x"), [picture()], max_text_length=5)
    with pytest.raises(DataError, match="no supervised token"):
        processor.encode(ask(None), [picture()])


def test_placeholder_mismatch_names_both_counts(processor):
    with pytest.raises(DataError, match="2 image placeholders but 1 images"):
        processor.encode(ask(None, None, answer="7"), [picture()])
    with pytest.raises(DataError, match="0 image placeholders but 1 images"):
        processor(images=picture(), text="no place")


@pytest.mark.parametrize("pad_left", [False, True])
def test_collate(processor, pad_left):
    items = [
        processor.encode(ask(None, text="a", answer="1"), [picture()]),
        processor.encode(ask(None, text="a longer one", answer="12"), [picture(30, 30)]),
    ]
    batch = processor.collate(items, pad_left=pad_left)
    length = max(len(item.input_ids) for item in items)
    for row, item in enumerate(items):
        size = len(item.input_ids)
        real = slice(length - size, None) if pad_left else slice(0, size)
        mask = batch["attention_mask"][row]
        assert mask[real].all()
        assert int(mask.sum()) == size
        assert batch["input_ids"][row][real].tolist() == item.input_ids.tolist()
        assert batch["labels"][row][real].tolist() == item.labels.tolist()
        assert set(batch["input_ids"][row][mask == 0].tolist()) <= {processor.pad_token_id}
        assert set(batch["labels"][row][mask == 0].tolist()) <= {IGNORE_INDEX}
    assert batch["num_tiles"].tolist() == [item.num_tiles for item in items]
    assert len(batch["pixel_values"]) == sum(item.num_tiles for item in items)
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "labels", "num_tiles"))
    assert batch["pixel_values"].dtype == torch.uint8
    assert (batch["tile_boxes"].dtype, len(batch["tile_boxes"])) == (torch.int16, len(batch["pixel_values"]))


def test_pad_token_falls_back_on_end_of_turn(tmp_path):
    processor = build_processor(tiny_spec(tmp_path))
    assert processor.pad_token_id == 256
    processor.tokenizer.pad_token = None
    assert processor.pad_token_id == processor.end_of_turn_id == 258


def test_apply_chat_template_encodes_as_encode_does(processor):
    messages = [ask(picture(), text="a"), ask(picture(30, 30, 9), picture(), text="longer")]
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    images = [[picture()], [picture(30, 30, 9), picture()]]
    items = [processor.encode(m, i, generation=True) for m, i in zip(messages, images, strict=True)]
    expected = processor.collate(items, pad_left=True)
    # Hugging Face's entry points give what a vision encoder takes, bit for bit.
    expected["pixel_values"] = torch.cat([normalised(item) for item in items])
    names = {"input_ids", "attention_mask", "pixel_values", "num_tiles", "thumbnails"}
    assert set(batch) == names == set(processor.model_input_names)
    for key in batch:
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)


def test_answers_are_spelled_in_training_and_in_later_prompts_by_the_loaded_processor_too(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["total"])  # what merges would make
    merged = tokenizer.convert_tokens_to_ids("total")
    first = AlignVLMProcessor(tokenizer, tokens_per_tile=TOKENS_PER_TILE, spell_answers=True)
    first.save_pretrained(tmp_path)
    second = AutoProcessor.from_pretrained(tmp_path)
    turns = ask(text="total?", answer="total")
    for one in (first, second):
        encoded = one.encode(turns, [])
        assert encoded.input_ids.tolist().count(merged) == 1  # the question's
        assert [label for label in encoded.labels if label != IGNORE_INDEX][:-1] == [
            *tokenizer("t o t a l")["input_ids"][::2]
        ]
    prompt = second.apply_chat_template([*turns, *ask(text="sure?")], tokenize=True, add_generation_prompt=True)
    assert prompt["input_ids"][0].tolist()[: len(encoded.input_ids)] == encoded.input_ids.tolist()


def test_images_of_a_message_may_be_files_or_bytes(processor, tmp_path):
    picture().save(tmp_path / "p.png")
    buffer = io.BytesIO()
    picture().save(buffer, format="PNG")
    batches = [
        processor.apply_chat_template(ask(image), tokenize=True)
        for image in (picture(), str(tmp_path / "p.png"), buffer.getvalue())
    ]
    for batch in batches[1:]:
        torch.testing.assert_close(batch["pixel_values"], batches[0]["pixel_values"], rtol=0, atol=0)
    with pytest.raises(DataError, match="carries no image"):
        processor.apply_chat_template(ask(None), tokenize=True)
    with pytest.raises(DataError, match=r"absent\.png"):
        processor.apply_chat_template(ask(str(tmp_path / "absent.png")), tokenize=True)


def test_rendered_text_goes_through_call(processor):
    conversations = [ask(picture(), text="a"), ask(picture(30, 30, 9), text="longer")]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    assert texts[0] == "<|im_start|>user\n<image>a<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(conversations[0], add_generation_prompt=True) == texts[0]
    called = processor(images=[picture(), picture(30, 30, 9)], text=texts, return_tensors="pt")
    nested = processor(images=[[picture()], [picture(30, 30, 9)]], text=texts)
    direct = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    for key in direct:
        torch.testing.assert_close(called[key], direct[key], rtol=0, atol=0)
        torch.testing.assert_close(nested[key], direct[key], rtol=0, atol=0)
    right = processor(images=[picture(), picture(30, 30, 9)], text=texts, padding_side="right")
    assert right["attention_mask"][:, 0].tolist() == [1, 1]
    assert called["attention_mask"][:, 0].tolist() == [1, 0]
    with pytest.raises(DataError, match="2 texts but 1 image groups"):
        processor(images=[picture()], text=texts)


def test_another_template_for_one_call(processor):
    text = processor.apply_chat_template(ask(text="q"), chat_template="llama3")
    assert text.startswith("<|begin_of_text|><|start_header_id|>user")
    with pytest.raises(ConfigError, match="did you mean 'llama3'"):
        processor.apply_chat_template(ask(text="q"), chat_template="lama3")


def test_post_process(processor):
    ids = processor.tokenizer(" 12.50 ")["input_ids"] + [processor.end_of_turn_id, processor.pad_token_id]
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["12.50"]


def test_save_and_load(processor, tmp_path):
    tiling = {**processor.tiling, "max_tiles": 2, "thumbnail": "last"}
    first = AlignVLMProcessor(
        processor.tokenizer,
        tiling=tiling,
        tokens_per_tile=5,
        chat_template="{% set x = 1 %}" + processor.chat_template,
    )
    first.save_pretrained(tmp_path)
    for second in (AlignVLMProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(second) is AlignVLMProcessor
        for name in (
            "tiling",
            "tokens_per_tile",
            "chat_template",
            "image_token_id",
            "end_of_turn_id",
            "pad_token_id",
        ):
            assert getattr(second, name) == getattr(first, name), name
        one, other = (p.encode(ask(None, answer="7"), [picture()]) for p in (first, second))
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
