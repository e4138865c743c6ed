"""What the tiny random models cannot show: collapse, cache, batches and readout of weights that have learned to read.

With random weights P_vocab is flat, the answers have no end, and which tokens are blank is set by hand; here all of it
comes from `box:receipts`.
"""

from typing import Any

import numpy as np
import pytest
import torch

from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.models import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm_pl.models.token_readout import PlacedToken, read_page
from datamodules.prepare.synthetic import generate_document
from datamodules.prepare.synthetic.generate import Document

BOX = "box:receipts"
STEPS = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> AlignVLMForConditionalGeneration:
    return AlignVLMForConditionalGeneration.from_pretrained(BOX).eval()


@pytest.fixture(scope="module")
def processor() -> AlignVLMProcessor:
    return AlignVLMProcessor.from_pretrained(BOX)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """A receipt and a form of six rows each, of one tile."""
    common = {"split": "heldout", "width": 768, "height": 192, "transcription_share": 0, "fault_share": 0}
    return [generate_document(seed, kind=kind, **common) for seed, kind in enumerate(("receipt", "form"))]


@pytest.fixture(scope="module")
def tokens(model, processor, documents) -> list[PlacedToken]:
    return read_page(model, processor, documents[0].image.convert("RGB"))


def batch_of(processor: AlignVLMProcessor, documents: list[Document]) -> dict[str, Any]:
    """The first question about each document, to be answered."""
    items = []
    for document in documents:
        content = [{"type": "image"}, {"type": "text", "text": document.turns[0].text}]
        page = document.image.convert("RGB")
        items.append(processor.encode([{"role": "user", "content": content}], [page], generation=True))
    batch = processor.collate(items, pad_left=True)
    del batch["labels"]
    return batch


def test_answers_of_a_batch_are_the_most_probable_ones_of_each_sample_alone(model, processor, documents) -> None:
    batch = batch_of(processor, documents)
    found = model.generate(**batch, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=[])
    for row, document in enumerate(documents):
        answer = found[row : row + 1, -STEPS:]
        alone = batch_of(processor, [document])
        ids = torch.cat([alone.pop("input_ids"), answer], dim=1)
        alone["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():  # the whole sequence at once, without a cache
            logits = model(input_ids=ids, **alone, use_cache=False).logits
        assert logits[:, -STEPS - 1 : -1].argmax(-1).tolist() == answer.tolist()


def test_most_visual_tokens_are_left_out_and_the_answers_stay(model, processor, documents) -> None:
    batch = batch_of(processor, documents)
    with torch.no_grad():
        kept = model(**batch, logits_to_keep=1).kept_tokens
    placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert 0.02 < int(kept.sum()) / placeholders < 0.3
    ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
    answers = processor.post_process_image_text_to_text(ids[:, batch["input_ids"].shape[1] :])
    scores = [anls(text, [document.turns[0].answer]) for text, document in zip(answers, documents, strict=True)]
    assert sum(scores) / len(scores) > 0.4, (answers, [document.turns[0].answer for document in documents])


def test_what_the_kept_tokens_show_is_the_text_of_the_page(tokens, documents) -> None:
    shown = [token for token in tokens if token.kept and not token.blank]
    for line in documents[0].lines:
        left, top, right, bottom = line["box"]
        inside = [
            token.text
            for token in shown
            if left <= (token.box[0] + token.box[2]) / 2 <= right and top <= (token.box[1] + token.box[3]) / 2 <= bottom
        ]
        letters = set(line["text"].lower()) - {" "}
        read = set("".join(inside).lower())
        assert len(letters & read) / len(letters) > 0.6, (line["text"], inside)


def test_blank_is_what_shows_no_ink(tokens, documents) -> None:
    pixels = np.asarray(documents[0].image.convert("L"))
    dark = {}
    for token in tokens:
        left, top, right, bottom = (round(edge) for edge in token.box)
        if right > left and bottom > top:
            dark.setdefault(token.blank, []).append(float((pixels[top:bottom, left:right] < 128).mean()))
    means = {blank: sum(shares) / len(shares) for blank, shares in dark.items()}
    assert means[False] > 4 * means[True], means


def test_a_saved_folder_answers_as_the_box(model, processor, documents, tmp_path) -> None:
    for one in (model, processor):
        one.save_pretrained(tmp_path)
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = batch_of(AlignVLMProcessor.from_pretrained(tmp_path), documents[:1])
    options = {"max_new_tokens": STEPS, "do_sample": False}
    assert again.generate(**batch, **options).tolist() == model.generate(**batch, **options).tolist()
