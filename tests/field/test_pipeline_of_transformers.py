"""The exported folder works in transformers' pipeline.

transformers PR#34783 and huggingface-inference-toolkit PR#42: processors whose methods do not have the signatures that
the pipeline calls them with.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    spec = tiny_spec(folder / "tokenizer")
    processor = build_processor(spec)
    torch.manual_seed(0)
    build_model(spec, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.fromarray(np.arange(40 * 90 * 3, dtype=np.uint8).reshape(40, 90, 3)).save(folder / "page.png")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=str(folder))


OPTIONS = {"max_new_tokens": 4, "return_full_text": False}
# Settings of decoding that the pipeline passes on.
DECODING = [{}, {"skip_special_tokens": True}, {"clean_up_tokenization_spaces": False, "skip_special_tokens": False}]


@pytest.mark.parametrize("decoding", DECODING)
def test_both_forms_give_the_same_text(pipe, folder, decoding):
    image = str(folder / "page.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    (chat,) = pipe(text=[{"role": "user", "content": content}], **OPTIONS, **decoding)
    prompt = "<|im_start|>user\n<image>what?<|im_end|>\n<|im_start|>assistant\n"
    (plain,) = pipe(images=Image.open(image), text=prompt, **OPTIONS, **decoding)
    assert isinstance(chat["generated_text"], str)
    assert chat["generated_text"] == plain["generated_text"]


def test_an_answer_that_is_begun_is_continued(pipe, folder):
    content = [{"type": "image", "url": str(folder / "page.png")}, {"type": "text", "text": "what?"}]
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    (found,) = pipe(text=[{"role": "user", "content": content}, begun], max_new_tokens=4, return_tensors=True)
    text = pipe.processor.decode(found["generated_token_ids"])
    assert "<|im_start|>assistant\nIt is" in text
    assert not text.split("It is")[1].startswith("<|im_end|>")


def test_batches_of_chats_give_what_single_chats_give(pipe, folder, tmp_path):
    image = {"type": "image", "image": str(folder / "page.png")}
    contents = [[image, {"type": "text", "text": "a"}], [{"type": "text", "text": "long?" * 9}], [image, image]]
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    chats = [[{"role": "user", "content": content}, begun] for content in contents]
    for full in (False, True):
        free = {"return_full_text": full, "generate_kwargs": {"min_new_tokens": 4, "max_new_tokens": 4}}
        single = pipe(text=chats, **free)
        assert pipe(text=chats, **free, batch_size=2) == single
        assert all(one["generated_text"] for (one,) in single)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_stop_sequence_ends_the_answer(pipe, folder):
    page = {"images": str(folder / "page.png"), "text": "<image>what?"}
    (free,) = pipe(**page, return_full_text=False, max_new_tokens=12)
    letter = next(one for one in free["generated_text"] if one.isascii())
    (stopped,) = pipe(**page, return_full_text=False, max_new_tokens=12, stop_sequence=letter)
    assert stopped["generated_text"].endswith(letter)
    assert len(stopped["generated_text"]) < len(free["generated_text"])


def test_post_process_has_the_signature_of_transformers(pipe):
    ids = torch.tensor([pipe.processor.tokenizer("a b")["input_ids"]])
    process = pipe.processor.post_process_image_text_to_text
    assert process(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ["a b"]
    assert process(ids, False, False) == process(ids[0], True, None) == ["a b"]
    assert (
        process(ids) == process(generated_outputs=ids) == pipe.processor.post_process_multimodal_output(ids) == ["a b"]
    )
    with pytest.raises(TypeError, match="clean_up"):
        process(ids, clean_up=True)
