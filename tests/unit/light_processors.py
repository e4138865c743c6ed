"""Processors for the tests of loaders, in a module that worker processes import quickly."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from alignvlm_pl.errors import DataError
from datamodules.shards.sample import message_text


class LetterProcessor:
    """Three ids a sample, the last supervised; remembers the limit it was given in its first id."""

    name = "letters"

    def identity(self):
        return {"tokenizer": self.name}

    def visual_tokens(self, sizes):
        return len(sizes)

    def encode(self, messages, images, *, max_text_length=None, generation=False):
        if "refuse" in message_text(messages[0]):
            raise DataError("refused")
        first = -1 if max_text_length is None else max_text_length
        return SimpleNamespace(input_ids=[first, 1, 2], labels=[-100, -100, 2], num_tiles=len(images), truncated=False)

    def collate(self, encoded, *, pad_left=False):
        return {
            "input_ids": torch.tensor([item.input_ids for item in encoded]),
            "attention_mask": torch.ones(len(encoded), 3, dtype=torch.long),
            "labels": torch.tensor([item.labels for item in encoded]),
            "pixel_values": torch.from_numpy(np.zeros((sum(i.num_tiles for i in encoded), 3, 2, 2), np.float32)),
            "num_tiles": torch.tensor([item.num_tiles for item in encoded]),
        }


class LongerProcessor(LetterProcessor):
    """As many ids as the number in the question, padded to the longest of the batch."""

    def count_tokens(self, messages, sizes, *, max_text_length=None):
        return int("".join(letter for letter in message_text(messages[0]) if letter.isdigit())) + 2

    def encode(self, messages, images, **options):
        length = self.count_tokens(messages, [])
        ids, labels = [1] * length, [2] * length
        return SimpleNamespace(input_ids=ids, labels=labels, num_tiles=len(images), truncated=False)

    def collate(self, encoded, *, pad_left=False):
        longest = max(len(item.input_ids) for item in encoded)
        ids = torch.tensor([item.input_ids + [0] * (longest - len(item.input_ids)) for item in encoded])
        return {"input_ids": ids, "labels": ids.clone()}


class Words:
    """As many ids as the question has letters; packs rows."""

    name = "words"

    def identity(self) -> dict[str, Any]:
        return {"tokenizer": self.name}

    def visual_tokens(self, sizes):
        return 0

    def count_tokens(self, messages, sizes, *, max_text_length=None):
        return len(message_text(messages[0]))

    def encode(self, messages, images, *, max_text_length=None, generation=False):
        ids = [1] * self.count_tokens(messages, [])
        return SimpleNamespace(input_ids=ids, labels=ids, truncated=False, num_tiles=0)

    def collate(self, encoded, *, pad_left=False):
        return {"labels": torch.ones(len(encoded), 2)}

    def collate_packed(self, rows):
        assert all(sum(len(item.input_ids) for item in row) <= 20 for row in rows)
        return {"labels": torch.ones(len(rows), 2)}
