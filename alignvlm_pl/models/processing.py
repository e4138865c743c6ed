"""Processor of AlignVLM: images to tiles, conversations to token ids and labels, and batches of both."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from ..errors import ConfigError, DataError, NothingToLearnError
from ..preprocessing.chat import (
    IGNORE_INDEX,
    ChatFragment,
    choose_template,
    end_of_turn_id,
    leave_open,
    render_chat,
    require_unicode,
    template_variables,
    tokenize_chat,
    truncate_text,
)
from ..preprocessing.imaging import cut_pixels, load_image
from ..preprocessing.messages import message_images, plain_messages
from ..preprocessing.tiling import Tiling, count_visual_tokens, plan_tiles
from .configuration import whole_number
from .loading import weights_folder
from .pixels import TileProcessor, normalise_tensor
from .processor_options import BatchOptions, parse_options, require_loading_options, require_mapping

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedConversation:
    """One encoded conversation.

    `input_ids` (L,) int64 have the image token at the positions of visual tokens, `labels` (L,) int64 `IGNORE_INDEX`
    where not supervised. `pixels` are (tiles, 3, H, W) uint8, `tile_boxes` (tiles, 4) int16 the boxes of the image in
    them, see `imaging.cut_pixels`, and `thumbnails` (tiles,) bool says which show the whole image beside its tiles.
    `truncated`: text was cut at `max_text_length`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    tile_boxes: np.ndarray
    thumbnails: np.ndarray
    truncated: bool = False

    @property
    def num_tiles(self) -> int:
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

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        tokenizer: Any = None,
        tiling: dict[str, Any] | None = None,
        tokens_per_tile: int = 729,
        chat_template: str | None = None,
        spell_answers: bool = False,
    ) -> None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            found = type(tokenizer).__name__
            raise ConfigError(f"processor: tokenizer is of type {found}, expected a fast tokenizer of transformers")
        super().__init__(tokenizer, chat_template=choose_template(tokenizer, chat_template))
        self.tiling = Tiling.from_dict(tiling or {}).to_dict()
        self.tokens_per_tile = whole_number("tokens_per_tile", tokens_per_tile, lowest=1)
        if not isinstance(spell_answers, bool):
            raise ConfigError(f"spell_answers={spell_answers!r:.60}, expected true or false")
        self.spell_answers = spell_answers
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
        tokenizer.padding_side = "left"  # as generation needs; the default of a call
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_of_turn_id = end_of_turn_id(tokenizer, self.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "AlignVLMProcessor":
        """Load a processor; keyword arguments are fields of it, or options of the tokenizer or the hub.

        Fields that `tiling` does not name keep their saved values. `box:NAME` is loaded as well.

        Raises:
            ConfigError: An option is unknown.
        """
        own = tuple(name for name in signature(cls.__init__).parameters if name != "self")
        if "_from_pipeline" not in kwargs:  # a pipeline passes the model's options here, too
            require_loading_options(kwargs, own, what="processor")
        tiling = kwargs.pop("tiling", None)
        processor: AlignVLMProcessor = super().from_pretrained(weights_folder(pretrained_model_name_or_path), **kwargs)
        if tiling is not None:
            merged = {**processor.tiling, **tiling} if isinstance(tiling, Mapping) else tiling
            processor.tiling = Tiling.from_dict(merged).to_dict()
        if kwargs.get("padding_side") is not None:
            processor.tokenizer.padding_side = kwargs["padding_side"]
        return processor

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.end_of_turn_id if pad is None else pad)

    @property
    def geometry(self) -> Tiling:
        return Tiling.from_dict(self.tiling)

    def identity(self) -> dict[str, Any]:
        """Return everything that ids and tiles of a conversation depend on, as plain values."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # set by the last call of the tokenizer
            tokenizer.pop(state, None)
        texts = {"tokenizer": json.dumps(tokenizer, sort_keys=True), "chat_template": self.chat_template}
        return {
            **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()},
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
        """Encode one conversation, see `preprocessing.chat.render_chat`, with its RGB images in the order of its parts.

        At most `max_text_length` text tokens are kept; visual tokens are not counted and never cut. For `generation` it
        ends with the opening of an assistant turn, and nothing is supervised.

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
        return sum(self._image_lengths(sizes, self.geometry))

    def count_tokens(
        self,
        messages: Sequence[dict[str, Any]],
        sizes: Sequence[tuple[int, int]],
        *,
        max_text_length: int | None = None,
    ) -> int:
        """As `encode`, but return the number of tokens, of images of these `sizes` (width, height) in pixels."""
        fragments = render_chat(self.tokenizer, messages, template=self.chat_template)
        return len(self._ids(fragments, sizes, max_text_length=max_text_length)[0])

    def collate(
        self, encoded: Sequence[EncodedConversation], *, pad_left: bool = False, length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Pad encoded conversations to a batch, of `length` tokens or the longest.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, L) int64; `pixel_values` (tiles, 3, H, W) uint8 and `tile_boxes`
            (tiles, 4) int16, normalised by the model; `num_tiles` (B,); with a tiling that has thumbnails `thumbnails`
            (tiles,) bool.
        """
        return {
            **self._pad([(item.input_ids, item.labels) for item in encoded], pad_left=pad_left, length=length),
            **self._join_tiles(encoded),
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
            **self._join_tiles([item for row in rows for item in row]),
            "num_tiles": torch.tensor([sum(item.num_tiles for item in row) for row in rows]),
            "segment_ids": pad_sequence(segments, batch_first=True),
            "document_tiles": torch.tensor([item.num_tiles for row in rows for item in row]),
        }

    def _join_tiles(self, encoded: Sequence[EncodedConversation]) -> dict[str, torch.Tensor]:
        thumbnails = np.concatenate([item.thumbnails for item in encoded])
        tiles = {
            "pixel_values": torch.from_numpy(concatenate_filled([item.pixels for item in encoded])),
            "tile_boxes": torch.from_numpy(np.concatenate([item.tile_boxes for item in encoded])),
        }
        has_thumbnails = self.geometry.thumbnail != "none" or thumbnails.any()  # one call may have its own tiling
        return {**tiles, "thumbnails": torch.from_numpy(thumbnails)} if has_thumbnails else tiles

    def _pad(
        self, rows: Sequence[tuple[np.ndarray, np.ndarray]], *, pad_left: bool = False, length: int | None = None
    ) -> dict[str, torch.Tensor]:
        length = length or max(len(ids) for ids, _ in rows)
        empty = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(rows), length), value) for name, value in empty.items()}
        for row, (ids, labels) in enumerate(rows):
            span = slice(length - len(ids), length) if pad_left else slice(len(ids))
            batch["input_ids"][row, span] = torch.from_numpy(ids)
            batch["labels"][row, span] = torch.from_numpy(labels)
            batch["attention_mask"][row, span] = 1
        return batch

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Encode rendered prompts: a string or a list of them, with one `<image>` per image.

        For conversations use `apply_chat_template`, in which content cannot contain control tokens.

        `images` are an image, a list of images (in the order of the `<image>` of all texts), or a list of lists, in the
        forms of `imaging.load_image`. Options are those of `processor_options`, flat or in transformers' groups:
        `padding` (True), `padding_side` ("left", as generation needs), `truncation`, `max_length`,
        `pad_to_multiple_of`, `return_tensors` ("pt"; "np"; None for lists), `images_kwargs` with fields of the tiling.

        Raises:
            ConfigError: An option is unknown or not supported.
            DataError: An image cannot be read, or the numbers of images and `<image>` differ.
        """
        if videos is not None or audio is not None:
            raise ConfigError("processor: videos and audio are not supported; the model takes text and images")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(line, str) for line in texts):
            raise ConfigError("processor: text must be a string or a list of strings, with one <image> per image")
        for number, line in enumerate(texts):
            require_unicode(line, f"processor: text {number}")
        options = self._options(kwargs)
        groups = _image_groups(images, texts)
        encoded = [
            self._encode_fragments(_rendered_fragments(line), group, options=options)
            for line, group in zip(texts, groups, strict=True)
        ]
        return self._features(encoded, options)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations; with `tokenize`, encode them with their images.

        A conversation is a list of messages with `role` and `content`, or a list of such lists. Image parts have their
        image under one of `image`, `url`, `path` and `base64`, in any form of `imaging.load_image`; OpenAI's
        `image_url` parts are taken. Other fields are refused, see `messages.plain_messages`.

        Arguments are those of transformers: `continue_final_message` leaves the last message open ("content" is the
        same), `return_assistant_tokens_mask` adds `assistant_masks` (B, L), 1 at tokens that training supervises, and
        without `return_dict` only `input_ids` are returned. Options of `__call__` come by themselves or in
        `processor_kwargs`, beside variables that the template reads.

        Raises:
            ConfigError: An option is unknown, not supported, or in conflict with another.
            DataError: A conversation is malformed, or an image cannot be read.
        """
        refused = {"tools": tools, "documents": documents, "load_audio_from_video": load_audio_from_video}
        for name, value in refused.items():
            if value:
                raise ConfigError(f"apply_chat_template: {name} is not supported; put it into a message as text")
        switches = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message == "content" or continue_final_message,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
            "tokenize": tokenize,
            "return_dict": return_dict,
        }
        for name, value in switches.items():
            if not isinstance(value, (bool, type(None))):
                raise ConfigError(f"apply_chat_template: {name}={value!r:.40}, expected true or false")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ConfigError(
                "apply_chat_template: continue_final_message excludes add_generation_prompt and "
                "return_assistant_tokens_mask; choose one"
            )
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ConfigError("apply_chat_template: return_assistant_tokens_mask needs tokenize=True, return_dict=True")
        extra = require_mapping("processor_kwargs", processor_kwargs)
        if twice := kwargs.keys() & extra.keys():
            raise ConfigError(f"apply_chat_template: {min(twice)} is given twice, by itself and in processor_kwargs")
        if isinstance(conversation, (Mapping, str)) or not isinstance(conversation, Sequence):
            raise DataError(
                f"apply_chat_template: the conversation is of type {type(conversation).__name__}, expected a list of "
                "messages (dicts with role and content), or a list of such lists"
            )
        template = choose_template(self.tokenizer, chat_template or self.chat_template)
        known = template_variables(template) if kwargs else frozenset()
        variables = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        options = self._options({**kwargs, **extra})
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = [plain_messages(one) for one in (conversation if batched else [conversation])]
        render = partial(render_chat, self.tokenizer, template=template, variables=variables)
        rendered = [render(messages, add_generation_prompt=add_generation_prompt) for messages in conversations]
        if continue_final_message:
            rendered = [leave_open(fragments) for fragments in rendered]
        if not tokenize:
            texts = ["".join(IMAGE_TOKEN if one.kind == "image" else one.text for one in found) for found in rendered]
            return texts if batched else texts[0]
        encoded = [
            self._encode_fragments(fragments, message_images(messages), options=options)
            for fragments, messages in zip(rendered, conversations, strict=True)
        ]
        batch = self._features(encoded, options, masks=return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Decode generated ids (B, L) to texts, see `decode`."""
        texts = self.batch_decode(generated_outputs, skip_special_tokens, clean_up_tokenization_spaces)
        return [text.strip() for text in texts]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Decode ids (L,) to a text, or (B, L) to a list of texts, as the tokenizer does.

        Raises:
            DataError: An id is negative, as the label of a position that is not supervised, or no whole number.
        """
        options = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        return self.tokenizer.decode(_plain_ids(token_ids), skip_special_tokens, **options)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """Decode ids (B, L) to texts, see `decode`."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    @property
    def image_processor(self) -> TileProcessor:
        """Images to tiles without text, under the name that transformers looks for."""
        return TileProcessor(self.geometry)

    @property
    def model_input_names(self) -> list[str]:
        thumbnails = [] if self.geometry.thumbnail == "none" else ["thumbnails"]
        return ["input_ids", "attention_mask", "pixel_values", "num_tiles", *thumbnails]

    def _options(self, given: Mapping[str, Any]) -> BatchOptions:
        side, longest = self.tokenizer.padding_side, int(self.tokenizer.model_max_length)
        return parse_options(given, tiling=self.geometry, padding_side=side, longest=longest)

    def _encode_fragments(
        self,
        fragments: Sequence[ChatFragment],
        images: Sequence[Any],
        *,
        max_text_length: int | None = None,
        options: BatchOptions | None = None,
    ) -> EncodedConversation:
        loaded = [load_image(image) for image in images]
        sizes = [image.size for image in loaded]
        tiling = options.tiling if options else self.geometry
        if options and options.truncation and options.max_length:
            visual = sum(self._image_lengths(sizes, tiling))
            max_text_length = options.max_length - visual
            if max_text_length < 0:
                raise ConfigError(
                    f"processor: max_length={options.max_length} is less than the {visual} visual tokens of a sample, "
                    "which are never cut; raise max_length, or lower images_kwargs max_tiles"
                )
        ids, labels, truncated = self._ids(fragments, sizes, max_text_length=max_text_length, tiling=tiling)
        pixels, boxes = _cut(loaded, tiling)
        plans = (plan_tiles(*size, tiling) for size in sizes)
        return EncodedConversation(
            input_ids=ids,
            labels=labels,
            pixels=pixels,
            tile_boxes=boxes,
            thumbnails=np.array([box.is_thumbnail for plan in plans for box in plan], dtype=bool),
            truncated=truncated,
        )

    def _ids(
        self,
        fragments: Sequence[ChatFragment],
        sizes: Sequence[tuple[int, int]],
        *,
        max_text_length: int | None,
        tiling: Tiling | None = None,
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
        repeats[tokens == self.image_token_id] = self._image_lengths(sizes, tiling or self.geometry)
        return tokens.repeat(repeats), np.array(labels, dtype=np.int64).repeat(repeats), truncated

    def _image_lengths(self, sizes: Sequence[tuple[int, int]], tiling: Tiling) -> list[int]:
        return [count_visual_tokens(*size, tiling, self.tokens_per_tile) for size in sizes]

    def _features(
        self, encoded: Sequence[EncodedConversation], options: BatchOptions, *, masks: bool = False
    ) -> BatchFeature:
        lengths = [len(item.input_ids) for item in encoded]
        lists = options.return_tensors is None
        if options.padding == "do_not_pad" and not lists and len(set(lengths)) > 1:
            raise ConfigError(
                f"processor: padding=False and rows of {min(lengths)} to {max(lengths)} tokens, which make no tensor; "
                "set padding=True, or return_tensors=None for lists"
            )
        pad_left, length = options.padding_side == "left", options.padded_length(max(lengths))
        batch: dict[str, Any] = {**self.collate(encoded, pad_left=pad_left, length=length)}
        labels = batch.pop("labels")
        if masks:
            batch["assistant_masks"] = (labels != IGNORE_INDEX).long()
        # Hugging Face users expect normalised pixel values.
        batch["pixel_values"] = normalise_tensor(batch["pixel_values"], batch.pop("tile_boxes"))
        real = batch["attention_mask"].bool()
        if not options.return_attention_mask:
            del batch["attention_mask"]
        if lists:
            shown = real if options.padding == "do_not_pad" else torch.ones_like(real)
            for name in {"input_ids", "attention_mask", "assistant_masks"} & batch.keys():
                batch[name] = [row[kept].tolist() for row, kept in zip(batch[name], shown, strict=True)]
            batch["pixel_values"] = list(batch["pixel_values"].numpy())
            for name in {"num_tiles", "thumbnails"} & batch.keys():
                batch[name] = batch[name].tolist()
        elif options.return_tensors == "np":
            batch = {name: value.numpy() for name, value in batch.items()}
        return BatchFeature(batch)


def _plain_ids(ids: Any) -> Any:
    """Return ids as lists of any depth, each checked."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, (list, tuple)):
        return [_plain_ids(one) for one in ids]
    if isinstance(ids, bool) or not isinstance(ids, Integral) or not 0 <= int(ids) < 2**31:
        raise DataError(
            f"processor: the id {ids!r:.40} is no token; before decoding replace {IGNORE_INDEX}, the label of what is "
            "not supervised, by pad_token_id"
        )
    return int(ids)


def _rendered_fragments(text: str) -> list[ChatFragment]:
    """Return the fragments of a rendered prompt, in which `<image>` stands for an image."""
    parts = re.split(f"({re.escape(IMAGE_TOKEN)})", text)
    return [ChatFragment("image") if part == IMAGE_TOKEN else ChatFragment("template", part) for part in parts if part]


def _cut(images: Sequence[Image.Image], tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and boxes of the tiles of all images."""
    empty = np.zeros((0, 3, tiling.tile_height, tiling.tile_width), np.uint8), np.zeros((0, 4), np.int16)
    pixels, boxes = zip(empty, *(cut_pixels(image, tiling) for image in images), strict=True)
    return concatenate_filled(pixels), np.concatenate(boxes)


def concatenate_filled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along the first axis, without a copy if only one is not empty."""
    filled = [array for array in arrays if len(array)]
    return filled[0] if len(filled) == 1 else np.concatenate(arrays)


def _image_groups(images: Any, texts: Sequence[str]) -> list[list[Any]]:
    """Return the images of each text: as grouped by the caller, or a flat list dealt out by the `<image>` of each."""
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
    if not any(isinstance(group, (list, tuple)) for group in images):
        if len(texts) == 1:
            return [list(images)]
        remaining, marks = iter(images), [line.count(IMAGE_TOKEN) for line in texts]
        if sum(marks) == len(images):
            return [[next(remaining) for _ in range(count)] for count in marks]
    groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]
    if len(groups) != len(texts):
        raise DataError(f"{len(texts)} texts but {len(groups)} image groups; give one list of images per text")
    return groups
