"""Processor of AlignVLM: images to tiles, conversations to token ids and labels, and batches of both."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from ..errors import DataError, NothingToLearnError
from ..preprocessing.chat import (
    IGNORE_INDEX,
    ChatFragment,
    choose_template,
    end_of_turn_id,
    render_chat,
    tokenize_chat,
    truncate_text,
)
from ..preprocessing.imaging import cut_pixels, load_image
from ..preprocessing.tiling import Tiling, count_visual_tokens
from .pixels import normalise_tensor

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedConversation:
    """One encoded conversation.

    Args:
        input_ids: (L,) int64, the image token at the positions of visual tokens.
        labels: (L,) int64, `IGNORE_INDEX` where not supervised.
        pixels: (tiles, 3, H, W) uint8.
        tile_boxes: (tiles, 4) int16, box of the image within each tile, see `imaging.cut_pixels`.
        truncated: Whether text was cut at `max_text_length`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    tile_boxes: np.ndarray
    truncated: bool = False

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.pixels)


class AlignVLMProcessor(ProcessorMixin):
    """Tiling, chat template, image placeholders and batching.

    Args:
        tokenizer: A fast Hugging Face tokenizer; the image token is added to it (not to the LLM's embeddings).
        tiling: Fields of `preprocessing.tiling.Tiling`.
        tokens_per_tile: Visual tokens of one tile.
        chat_template: See `preprocessing.chat.choose_template`.
        spell_answers: See `preprocessing.chat.tokenize_chat`; saved, because answers in a prompt are tokenized as in
            training.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        tiling: dict[str, Any] | None = None,
        tokens_per_tile: int = 729,
        chat_template: str | None = None,
        spell_answers: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, chat_template=choose_template(tokenizer, chat_template))
        self.tiling = Tiling.from_dict(tiling or {}).to_dict()
        self.tokens_per_tile = tokens_per_tile
        self.spell_answers = spell_answers
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_of_turn_id = end_of_turn_id(tokenizer, self.chat_template)

    @property
    def pad_token_id(self) -> int:
        """Id used for padding; masked by the attention mask."""
        pad = self.tokenizer.pad_token_id
        return int(self.end_of_turn_id if pad is None else pad)

    @property
    def geometry(self) -> Tiling:
        """The tiling as a `Tiling`."""
        return Tiling.from_dict(self.tiling)

    def identity(self) -> dict[str, Any]:
        """Return everything that ids and tiles of a conversation depend on, as plain values."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # set by the last call of the tokenizer
            tokenizer.pop(state, None)
        digest = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
        return {
            "tokenizer": digest[:16],
            "chat_template": hashlib.sha256(self.chat_template.encode()).hexdigest()[:16],
            "tiling": dict(self.tiling),
            "tokens_per_tile": self.tokens_per_tile,
            "spell_answers": self.spell_answers,
        }

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        *,
        max_text_length: int | None = None,
        generation: bool = False,
    ) -> EncodedConversation:
        """Encode one conversation.

        Args:
            messages: See `preprocessing.chat.render_chat`; image parts in the order of `images`.
            images: RGB images.
            max_text_length: Maximum number of text tokens; visual tokens are not counted and never cut.
            generation: End with the opening of an assistant turn, and supervise nothing.

        Raises:
            DataError: If the numbers of images and placeholders differ, or (in training) no token is supervised.
        """
        fragments = render_chat(self.tokenizer, messages, template=self.chat_template, add_generation_prompt=generation)
        limit = None if generation else max_text_length
        encoded = self._encode_fragments(fragments, images, max_text_length=limit)
        if not generation and (encoded.labels[1:] == IGNORE_INDEX).all():
            raise NothingToLearnError(f"no supervised token is left (no answer, or all beyond max_text_length={limit})")
        return encoded

    def visual_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the number of visual tokens of images of these sizes, (width, height) in pixels."""
        return sum(self._image_lengths(sizes))

    def count_tokens(
        self,
        messages: Sequence[dict[str, Any]],
        sizes: Sequence[tuple[int, int]],
        *,
        max_text_length: int | None = None,
    ) -> int:
        """Return the number of visual and text tokens that `encode` gives a conversation, without opening its images.

        `sizes` are (width, height) in pixels of each image.

        Raises:
            DataError: If the numbers of images and placeholders differ.
        """
        fragments = render_chat(self.tokenizer, messages, template=self.chat_template)
        return len(self._ids(fragments, sizes, max_text_length=max_text_length)[0])

    def collate(self, encoded: Sequence[EncodedConversation], *, pad_left: bool = False) -> dict[str, torch.Tensor]:
        """Pad encoded conversations to a batch.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, L) int64; `pixel_values` (tiles, 3, H, W) uint8 and `tile_boxes`
            (tiles, 4) int16, normalised by the model; `num_tiles` (B,).
        """
        return {
            **self._pad([(item.input_ids, item.labels) for item in encoded], pad_left=pad_left),
            **_join_tiles(encoded),
            "num_tiles": torch.tensor([item.num_tiles for item in encoded]),
        }

    def collate_packed(self, rows: Sequence[Sequence[EncodedConversation]]) -> dict[str, torch.Tensor]:
        """Concatenate the documents of each row, at least one, and pad the rows on the right to the longest.

        Returns:
            As `collate`, with `num_tiles` (R,) per row; also `segment_ids` (R, L) int64, number of the document within
            its row from 1, 0 for padding; and `document_tiles` (documents,).
        """
        joined, segments = [], []
        for row in rows:
            lengths = torch.tensor([len(item.input_ids) for item in row])
            labels = np.concatenate([item.labels for item in row])
            # The first token of a document must not be predicted from the document before it.
            labels[(lengths.cumsum(0) - lengths).numpy()] = IGNORE_INDEX
            joined.append((np.concatenate([item.input_ids for item in row]), labels))
            segments.append(torch.arange(1, len(row) + 1).repeat_interleave(lengths))
        return {
            **self._pad(joined),
            **_join_tiles([item for row in rows for item in row]),
            "num_tiles": torch.tensor([sum(item.num_tiles for item in row) for row in rows]),
            "segment_ids": pad_sequence(segments, batch_first=True),
            "document_tiles": torch.tensor([item.num_tiles for row in rows for item in row]),
        }

    def _pad(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], *, pad_left: bool = False) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
        for row, (own_ids, own_labels) in enumerate(rows):
            size = len(own_ids)
            span = slice(length - size, length) if pad_left else slice(0, size)
            ids[row, span] = own_ids
            labels[row, span] = own_labels
            mask[row, span] = 1
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Encode rendered prompts: text with one `<image>` per image.

        For conversations use `apply_chat_template`, in which content cannot contain control tokens.

        Args:
            images: An image, a list of images (one per text), or a list of lists.
            text: A string or a list of strings.
            **kwargs: `padding_side` ("left" by default, as generation needs) and `return_tensors` ("pt").
        """
        texts = [text] if isinstance(text, str) else list(text)
        groups = _image_groups(images, len(texts))
        encoded = [self._encode_rendered(line, group) for line, group in zip(texts, groups, strict=True)]
        return self._features(encoded, **kwargs)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render conversations; with `tokenize`, encode them with their images.

        Args:
            conversation: A list of messages, or a list of such lists. Image parts have their image under `image` (a PIL
                image, bytes or a path).
            chat_template: Template for this call; default: the processor's.
            **kwargs: `add_generation_prompt`, `tokenize`, `padding_side`, `return_tensors`, `return_dict` (always so).
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        generation = bool(kwargs.pop("add_generation_prompt", False))
        template = choose_template(self.tokenizer, chat_template or self.chat_template)
        rendered = [
            render_chat(self.tokenizer, messages, template=template, add_generation_prompt=generation)
            for messages in conversations
        ]
        if not kwargs.pop("tokenize", False):
            texts = ["".join(IMAGE_TOKEN if one.kind == "image" else one.text for one in found) for found in rendered]
            return texts if batched else texts[0]
        encoded = [
            self._encode_fragments(fragments, _message_images(messages))
            for fragments, messages in zip(rendered, conversations, strict=True)
        ]
        return self._features(encoded, **kwargs)

    def post_process_image_text_to_text(
        self, generated: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode generated ids (B, L) to texts; other arguments are those of the tokenizer's `batch_decode`."""
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that are inputs of the model."""
        return ["input_ids", "attention_mask", "pixel_values", "num_tiles"]

    def _encode_rendered(self, text: str, images: Sequence[Any]) -> EncodedConversation:
        fragments: list[ChatFragment] = []
        for index, part in enumerate(text.split(IMAGE_TOKEN)):
            fragments += [ChatFragment("image")] if index else []
            fragments += [ChatFragment("template", part)] if part else []
        return self._encode_fragments(fragments, images)

    def _encode_fragments(
        self, fragments: Sequence[ChatFragment], images: Sequence[Any], *, max_text_length: int | None = None
    ) -> EncodedConversation:
        loaded = [i if isinstance(i, Image.Image) else load_image(i) for i in images]
        ids, labels, truncated = self._ids(fragments, [image.size for image in loaded], max_text_length=max_text_length)
        pixels, boxes = _cut(loaded, self.geometry)
        return EncodedConversation(input_ids=ids, labels=labels, pixels=pixels, tile_boxes=boxes, truncated=truncated)

    def _ids(
        self,
        fragments: Sequence[ChatFragment],
        sizes: Sequence[tuple[int, int]],
        *,
        max_text_length: int | None,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return ids (L,), labels (L,) and whether text was cut, for images of these sizes."""
        ids, labels = tokenize_chat(
            self.tokenizer, fragments, image_token_id=self.image_token_id, spell_answers=self.spell_answers
        )
        found = ids.count(self.image_token_id)
        if found != len(sizes):
            raise DataError(f"the conversation has {found} image placeholders but {len(sizes)} images")
        truncated = max_text_length is not None and truncate_text(
            ids, labels, image_token_id=self.image_token_id, max_text_length=max_text_length
        )
        tokens = np.array(ids, dtype=np.int64)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[tokens == self.image_token_id] = self._image_lengths(sizes)
        return tokens.repeat(repeats), np.array(labels, dtype=np.int64).repeat(repeats), truncated

    def _image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        tiling = self.geometry
        return [count_visual_tokens(*size, tiling, self.tokens_per_tile) for size in sizes]

    def _features(self, encoded: Sequence[EncodedConversation], **kwargs: Any) -> BatchFeature:
        batch = self.collate(encoded, pad_left=kwargs.get("padding_side", "left") == "left")
        batch.pop("labels")
        # Hugging Face users expect normalised pixel values.
        batch["pixel_values"] = normalise_tensor(batch["pixel_values"], batch.pop("tile_boxes"))
        return BatchFeature(batch)


def _cut(images: Sequence[Image.Image], tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and boxes of the tiles of all images."""
    empty = np.zeros((0, 3, tiling.tile_height, tiling.tile_width), np.uint8), np.zeros((0, 4), np.int16)
    pixels, boxes = zip(empty, *(cut_pixels(image, tiling) for image in images), strict=True)
    return concatenate_filled(pixels), np.concatenate(boxes)


def _join_tiles(encoded: Sequence[EncodedConversation]) -> dict[str, torch.Tensor]:
    """Return `pixel_values` and `tile_boxes` of a batch."""
    return {
        "pixel_values": torch.from_numpy(concatenate_filled([item.pixels for item in encoded])),
        "tile_boxes": torch.from_numpy(np.concatenate([item.tile_boxes for item in encoded])),
    }


def concatenate_filled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along the first axis, without a copy if only one is not empty."""
    filled = [array for array in arrays if len(array)]
    return filled[0] if len(filled) == 1 else np.concatenate(arrays)


def _image_groups(images: Any, count: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if count == 1 and not (images and isinstance(images[0], (list, tuple))):
        return [list(images)]
    groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]
    if len(groups) != count:
        raise DataError(f"{count} texts but {len(groups)} image groups; give one list of images per text")
    return groups


def _message_images(messages: Sequence[dict[str, Any]]) -> list[Any]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    found = [part.get("image", part.get("url", part.get("path"))) for part in parts if part["type"] == "image"]
    if any(image is None for image in found):
        raise DataError(
            'an image part carries no image: expected {"type": "image", "image": <PIL image, bytes or path>}'
        )
    return found
