"""A field of a message is in the prompt, or refused by its name.

huggingface/transformers#45418, huggingface/trl#5517: `tool_calls` that a processor or a template dropped in silence.
"""

import pytest

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import tiny_tokenizer

CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.fixture(scope="module")
def processor():
    return AlignVLMProcessor(tiny_tokenizer())


def part(**fields):
    return {"role": "user", "content": [fields]}


DROPPED = {
    "tool_calls": (
        {"role": "assistant", "content": "a", "tool_calls": CALL},
        r"messages\[1\] has the field 'tool_calls'",
    ),
    "reasoning_content": ({"role": "assistant", "content": "a", "reasoning_content": "r"}, "'reasoning_content'"),
    "name": ({"role": "user", "content": "a", "name": "Ada"}, "'name', which no prompt shows; known: content, role"),
    "flag": ({"role": "assistant", "content": "a", "prefix": True}, "'prefix'"),
    "zero": ({"role": "user", "content": "a", "weight": 0}, "'weight'"),
    "number": ({"role": "user", "content": "a", 5: "b"}, "'5'"),
    "no text": (part(type="text"), r"messages\[1\].content\[0\] is a text part without 'text'"),
    "text of another client": (part(type="text", content="a"), r"content\[0\] has the field 'content'"),
    "image in a text part": (part(type="text", text="a", image="a.png"), "has the field 'image'"),
    "text in an image part": (part(type="image", image="a.png", text="a"), "has the field 'text'"),
    "two images": (part(type="image", image="a.png", url="b.png"), "an image under 'image' and under 'url'; leave one"),
    "two of three": (part(type="image", path="a.png", base64="b"), "under 'path' and under 'base64'"),
    "size": (part(type="image", image="a.png", max_pixels=5), "has the field 'max_pixels'"),
    "misspelt": (part(type="image", imgae="a.png"), "'imgae'.*did you mean 'image'"),
    "detail": (part(type="image_url", image_url={"url": "a.png", "detail": "high"}), "'detail'.*images_kwargs"),
    "beside image_url": (part(type="image_url", image_url="a.png", text="a"), "has the field 'text'"),
    "half a pair": (
        {"role": "user", "content": "a\ud83d"},
        r"messages\[1\] has half a surrogate pair, '\\ud83d', at character 1",
    ),
    "half a pair in a part": (part(type="text", text="\udc00"), r"messages\[1\] has half a surrogate pair"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_field_that_no_prompt_shows_is_named(case, processor):
    message, match = DROPPED[case]
    for tokenize in (False, True):
        with pytest.raises(DataError, match=match) as caught:
            processor.apply_chat_template([{"role": "user", "content": "q"}, message], tokenize=tokenize)
        assert len(str(caught.value)) <= 300
        assert "\n" not in str(caught.value)


def test_empty_fields_count_as_absent(processor):
    text = {"type": "text", "text": "a", "image": None, "annotations": []}
    message = {"role": "user", "content": [text, {"type": "image", "text": None}], "tool_calls": None, "name": ""}
    link = {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}
    found = processor.apply_chat_template([message, {"role": "user", "content": [link]}])
    assert found == "<|im_start|>user\na<image><|im_end|>\n<|im_start|>user\n<image><|im_end|>\n"


def test_half_a_surrogate_pair_in_other_text(processor):
    with pytest.raises(DataError, match=r"processor: text 1 has half a surrogate pair, '\\ud83d', at character 0"):
        processor(text=["a", "\ud83d"])
    asked = [{"role": "user", "content": "q"}]
    for given in ({"chat_template": "\ud83d" + processor.chat_template}, {"chat_template": "{{ a }}", "a": "\ud83d"}):
        with pytest.raises(DataError, match="the chat template, or a variable of it, has half a surrogate pair"):
            processor.apply_chat_template(asked, **given)
    whole = [{"role": "user", "content": "\U0001f600"}]
    assert "\U0001f600" in processor.apply_chat_template(whole)
