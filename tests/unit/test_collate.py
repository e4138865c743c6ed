"""Samples -> batch: what is encoded, what stands beside the tensors, and what is refused."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.loading.collate import Collator
from datamodules.shards.sample import Sample, SampleError, message_text


@dataclass
class Encoded:
    input_ids: list[int]
    labels: list[int]
    pixel_values: np.ndarray
    num_tiles: int
    truncated: bool


class WordProcessor:
    """Ids are word lengths, labels the words of assistant turns; a tile holds the width of its image."""

    def encode(self, messages, images, *, max_text_length=None, generation=False):
        words = [(len(word), turn["role"]) for turn in messages for word in message_text(turn).split()]
        cut = max_text_length is not None and len(words) > max_text_length
        words = words[:max_text_length]
        if any(size > 20 for size, _ in words):
            raise DataError("a word is too long")
        labels = [size if role == "assistant" else -100 for size, role in words]
        tiles = np.array([image.width for image in images], dtype=np.float32).reshape(-1, 1, 1, 1)
        return Encoded([size for size, _ in words], labels, tiles, len(images), cut)

    def collate(self, encoded, *, pad_left=False):
        length = max(len(item.input_ids) for item in encoded)

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            fill = [[value] * (length - len(row)) for row in rows]
            return torch.tensor([f + r if pad_left else r + f for r, f in zip(rows, fill, strict=True)])

        return {
            "input_ids": pad([item.input_ids for item in encoded], 0),
            "attention_mask": pad([[1] * len(item.input_ids) for item in encoded], 0),
            "labels": pad([item.labels for item in encoded], -100),
            "pixel_values": torch.from_numpy(np.concatenate([item.pixel_values for item in encoded])),
            "num_tiles": torch.tensor([item.num_tiles for item in encoded]),
        }

    def collate_packed(self, rows):
        joined = [
            Encoded(
                [token for item in row for token in item.input_ids],
                [label for item in row for label in item.labels],
                np.concatenate([item.pixel_values for item in row]),
                sum(item.num_tiles for item in row),
                False,
            )
            for row in rows
        ]
        return self.collate(joined) | {"document_tiles": torch.tensor([item.num_tiles for row in rows for item in row])}


def sample(key: str, *turns: str, widths: tuple[int, ...] = (5,), order: tuple[int, ...] | None = None) -> Sample:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(turns)
    ]
    indices = range(len(widths)) if order is None else order
    messages[0]["content"] = [{"type": "image", "index": i} for i in indices] + messages[0]["content"]
    return Sample(
        key=key,
        source="made",
        task="vqa",
        messages=messages,
        images=[Image.new("RGB", (width, 3)) for width in widths],
        references=[turns[-1], "other"],
        lines=[{"text": "a", "box": [0, 0, 1, 1]}],
        sizes=[(width, 3) for width in widths],
    )


def make_batch(*samples: Sample, filler: bool = False, **options: Any) -> dict[str, Any]:
    collator = Collator(processor=WordProcessor(), **options)
    return collator.collate([collator.encode(item) for item in samples], filler=filler)


def test_training_batches_are_padded_right_and_carry_their_fields():
    batch = make_batch(sample("a", "one two", "three"), sample("b", "four", "yes", widths=(7, 9)))
    assert batch["input_ids"].tolist() == [[3, 3, 5], [4, 3, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5], [-100, 3, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch["num_tiles"].tolist(), batch["pixel_values"].flatten().tolist()) == ([1, 2], [5, 7, 9])
    assert (batch["keys"], batch["sources"], batch["filler"]) == (["a", "b"], ["made", "made"], False)
    assert batch["sizes"] == [[(5, 3)], [(7, 3), (9, 3)]]
    assert [len(lines) for lines in batch["lines"]] == [1, 2]
    assert batch["lines"][1] == [[{"text": "a", "box": [0, 0, 1, 1]}], []]
    assert batch["truncated"] == [False, False]
    assert "references" not in batch


def test_a_batch_says_which_samples_were_cut():
    batch = make_batch(sample("a", "one", "two six"), sample("b", "one", "two"), max_text_length=2)
    assert batch["truncated"] == [True, False]


def test_generation_batches_are_left_padded_prompts_with_references():
    samples = sample("a", "one two", "three"), sample("b", "four", "yes", "and six", "no")
    batch = make_batch(*samples, generation=True)
    assert batch["input_ids"].tolist() == [[0, 0, 3, 3], [4, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["references"] == [["three", "other"], ["no", "other"]]
    assert batch["questions"] == ["one two", "and six"]


def test_the_first_reference_answers_a_sample_that_ends_with_a_question():
    asked = sample("a", "one two")
    asked.references[:] = ["seven", "eight"]
    assert make_batch(asked)["labels"].tolist() == [[-100, -100, 5]]
    assert make_batch(asked, generation=True)["input_ids"].tolist() == [[3, 3]]


def test_images_reach_the_processor_in_the_order_of_their_placeholders():
    batch = make_batch(sample("a", "one", "two", widths=(4, 6, 8), order=(2, 0, 1)))
    assert batch["pixel_values"].flatten().tolist() == [8, 4, 6]


def test_a_batch_without_supervised_tokens_names_its_keys():
    with pytest.raises(DataError, match=r"no supervised token \(keys a, b\).*max_text_length=2"):
        make_batch(sample("a", "one two", "three"), sample("b", "one two", "x"), max_text_length=2)


def test_a_first_label_alone_teaches_nothing():
    lone = sample("a", "", "word")
    with pytest.raises(DataError, match="no supervised token"):
        make_batch(lone)


def test_a_filler_has_no_supervised_token_and_may():
    batch = make_batch(sample("a", "one", "two"), filler=True)
    assert batch["filler"] is True
    assert (batch["labels"] == -100).all()


def test_what_the_processor_refuses_is_a_bad_sample():
    with pytest.raises(SampleError, match="sample 'a' of made: a word is too long") as caught:
        make_batch(sample("a", "x" * 21, "y"))
    assert caught.value.reason == "not_encodable"


def test_packed_batches_list_their_documents_in_reading_order():
    first, second = sample("a", "one", "three"), sample("b", "four", "yes no", widths=(7, 9))
    third = sample("c", "five", "seven", widths=(8,))
    collator = Collator(processor=WordProcessor(), max_text_length=2)
    encoded = [collator.encode(item) for item in (first, second, third)]
    batch = collator.collate_packed([encoded[:2], encoded[2:]])
    assert batch["input_ids"].tolist() == [[3, 5, 4, 3], [4, 5, 0, 0]]
    assert (batch["keys"], batch["rows"], batch["documents_per_row"]) == (["a", "b", "c"], [0, 0, 1], [2, 1])
    assert (batch["sources"], batch["filler"]) == (["made"] * 3, False)
    assert batch["sizes"] == [[(5, 3)], [(7, 3), (9, 3)], [(8, 3)]]
    assert [len(lines) for lines in batch["lines"]] == [1, 2, 1]
    assert batch["truncated"] == [False, True, False]
    assert (batch["num_tiles"].tolist(), batch["document_tiles"].tolist()) == ([3, 1], [1, 2, 1])


def test_a_packed_batch_without_supervised_tokens_names_its_keys():
    collator = Collator(processor=WordProcessor(), max_text_length=2)
    encoded = [collator.encode(sample(key, "one two", "three")) for key in "abc"]
    with pytest.raises(DataError, match=r"no supervised token \(keys a, b, c\).*max_text_length=2"):
        collator.collate_packed([encoded[:2], encoded[2:]])
