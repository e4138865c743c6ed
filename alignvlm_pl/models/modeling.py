"""AlignVLM as a Hugging Face model: vision tower, connector, LLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from ..errors import ConfigError, DataError
from ..preprocessing.chat import IGNORE_INDEX
from ..preprocessing.tiling import Tiling
from . import generation
from .collapse import Collapse
from .configuration import AlignVLMConfig, require_dtype
from .connectors import build_connector, shuffle_factor
from .connectors.grid import pixel_shuffle, shuffled_grid
from .inputs import check_inputs, check_tiles, require_tensors
from .loading import weights_folder
from .losses import TokenLoss, check_labels, supervised_cross_entropy
from .pixels import as_tiles, at_least_one_tile, distinct_tiles
from .sequences import dropped_positions, packed_arguments, require_two_axes, shorten, shorten_inputs, splice
from .vision import build_vision_tower, patch_grid, token_grid

_BY_TILE = ("pixel_values", "tile_boxes", "thumbnails")
"""Inputs with one entry per tile; all others have one per sample."""


class Embedded(NamedTuple):
    """The LLM's inputs (B, L, D), log P_vocab of requested columns or None, and which visual tokens the LLM is to run
    on, (tiles, tokens) bool; None: on all.
    """

    embeds: Tensor
    log_probs: Tensor | None = None
    kept: Tensor | None = None


@dataclass
class AlignVLMOutput(ModelOutput):
    """Output of `AlignVLMForConditionalGeneration`.

    If labels were given, `loss` is the mean cross entropy over supervised positions (0 without any), `loss_sum` and
    `num_supervised` are its parts, and `document_loss_sums` and `document_supervised` (documents,) those of each
    document in reading order, without gradient. Else `logits` are (B, L or logits_to_keep, V): with labels the head
    runs on supervised positions only. `readout_log_probs` (tiles, tokens, columns) are log P_vocab of
    `readout_columns`, if given; the others are the LLM's. `kept_tokens` (tiles, tokens) bool are the visual tokens that
    it ran on, None for all (`connector.collapse`); its cache, hidden states and attentions have no others, but `logits`
    have all L positions, those of a token left out being of the last one before it that was kept.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    readout_log_probs: Tensor | None = None
    kept_tokens: Tensor | None = None
    loss_sum: Tensor | None = None
    num_supervised: Tensor | None = None
    document_loss_sums: Tensor | None = None
    document_supervised: Tensor | None = None


class AlignVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Document VLM: the connector maps vision features to averages of the LLM's text embeddings."""

    config: AlignVLMConfig
    config_class = AlignVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []

    def __init__(self, config: AlignVLMConfig) -> None:
        super().__init__(config)
        text = config.text_config
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(text, name, None) not in (None, 1, 1.0):
                raise ConfigError(f"LLMs that transform their logits are not supported: text_config.{name} is set")
        self.vision_tower = build_vision_tower(config.vision_config, config.vision_feature)
        self.connector: Any = connector_from_config(config)
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.loss_backend = "auto"  # a name of alignvlm_pl.ops.linear_cross_entropy.BACKENDS
        self.post_init()
        self.initialize_connector()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, or of `box:NAME`; raise a `ConfigError` if dtype or a field of the configuration is
        invalid.
        """
        require_dtype(kwargs)
        return super().from_pretrained(weights_folder(pretrained_model_name_or_path), *args, **kwargs)

    def initialize_connector(self) -> None:
        """Initialise the connector from the LM head; to be called again after pretrained weights are loaded."""
        self.connector.initialize(self.language_model.get_output_embeddings().weight.data)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the embedding table (V, D); raise a `ConfigError` for one of another size."""
        self._require_same_size("set_input_embeddings", value, self.get_input_embeddings())
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Set the LM head, of weight (V, D); raise a `ConfigError` for one of another size."""
        self._require_same_size("set_output_embeddings", value, self.get_output_embeddings())
        self.language_model.set_output_embeddings(value)

    def _require_same_size(self, name: str, value: nn.Module, old: nn.Module) -> None:
        expected, found = (getattr(getattr(module, "weight", None), "shape", ()) for module in (old, value))
        if found != expected:
            raise ConfigError(
                f"{name}: weight of shape {tuple(found)}, expected {tuple(expected)}; the connector and the "
                "placeholder's id are bound to the vocabulary"
            )

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Return the embedding table (V, D); raise a `ConfigError` if another V is asked for."""
        rows = self.config.text_config.vocab_size
        if new_num_tokens not in (None, rows) or (pad_to_multiple_of or 1) > 1:
            raise ConfigError(
                f"resize_token_embeddings({new_num_tokens}): the connector and the placeholder's id are bound to the "
                f"{rows} rows of the vocabulary; resize the LLM before it becomes a part of the model (llm.pretrained)"
            )
        return self.get_input_embeddings()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the connector's input (tiles, tokens, d) for normalised pixel values (tiles, 3, H, W).

        Without gradients the vision tower runs once on tiles that are equal.

        Raises:
            DataError: If the connector's number of tokens differs from `config.tokens_per_tile`.
            ConfigError: If width or number of the features do not match the connector.
        """
        distinct = None if torch.is_grad_enabled() else distinct_tiles(pixel_values)
        tiles, rows = (pixel_values, slice(None)) if distinct is None else distinct
        features = connector_features(self.vision_tower, tiles, self.config)[rows]
        tokens = self.connector.tokens_per_tile(features.shape[1])
        if tokens != self.config.tokens_per_tile:
            raise DataError(
                f"the vision tower gave {features.shape[1]} tokens for a tile of {tuple(pixel_values.shape[-2:])} px, "
                f"config.tokens_per_tile is {self.config.tokens_per_tile}, and the connector makes {tokens} of them"
            )
        return features

    def get_image_features(
        self, pixel_values: Tensor, tile_boxes: Tensor | None = None, *, return_dict: bool = True
    ) -> BaseModelOutputWithPooling | tuple[Tensor, Tensor]:
        """Return the features of tiles (tiles, 3, H, W), of which uint8 ones need `tile_boxes`, see `forward`.

        `last_hidden_state` is the connector's input (tiles, tokens, d), `pooler_output` are the embeddings
        (tiles, tokens_per_tile, D) that stand at the visual positions; without `return_dict` a tuple of the two.

        Raises:
            DataError: An input has another type or shape.
        """
        if pixel_values is None:
            raise DataError("get_image_features needs pixel_values (tiles, 3, H, W)")
        require_tensors({"pixel_values": pixel_values, "tile_boxes": tile_boxes})
        check_tiles(self.config, pixel_values)
        features = self.encode_images(at_least_one_tile(as_tiles(pixel_values, tile_boxes)))
        embeds = self.connector(features, self.get_input_embeddings().weight).embeds
        found = features[: len(pixel_values)], embeds[: len(pixel_values)]
        return BaseModelOutputWithPooling(*found) if return_dict else found

    def read(
        self, pixel_values: Tensor, columns: Tensor | Sequence[int], *, tile_boxes: Tensor | None = None
    ) -> Tensor:
        """Return log P_vocab (tiles, tokens, len(columns)) for pixel values (tiles, 3, H, W), without running the LLM.

        Tiles may have any size that the vision tower accepts; uint8 tiles need `tile_boxes`, see `forward`.

        Raises:
            ConfigError: If the connector's weights are not probabilities of text tokens.
            DataError: If uint8 tiles have no `tile_boxes`.
        """
        if not self.connector.reads_text:
            raise ConfigError(f"connector {self.config.connector['type']!r} has no P_vocab to read out; use 'align'")
        tiles = at_least_one_tile(as_tiles(pixel_values, tile_boxes))
        features = connector_features(self.vision_tower, tiles, self.config)
        return self.connector.log_probs(features, columns)[: len(pixel_values)]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        num_tiles: Tensor | None,
        columns: Tensor | Sequence[int] | None,
        *,
        tile_boxes: Tensor | None = None,
        positions: Tensor | None = None,
        thumbnails: Tensor | None = None,
    ) -> Embedded:
        """Return the LLM's input embeddings (B, L, D) with the visual tokens, and log P_vocab of `columns` or None.

        A batch without tiles runs one tile of zeros and drops the result: all ranks then run the same modules, and all
        parameters have (zero) gradients, as DDP and FSDP require. `positions` are those of `sequences.splice`.

        Raises a DataError for an id outside the vocabulary, placeholders without tiles, and `thumbnails` that are
        missing, see `forward`.
        """
        mask = input_ids == self.config.image_token_id
        table = self.get_input_embeddings()
        # The placeholder's id may lie outside the table; its embedding is replaced below.
        try:
            embeds = table(input_ids.masked_fill(mask, 0))
        except IndexError as error:  # on a CPU
            raise DataError(
                f"input_ids have an id of {int(input_ids.min())} to {int(input_ids.max())}, expected 0 to "
                f"{self.config.text_config.vocab_size - 1} of the LLM's vocabulary, or {self.config.image_token_id} of "
                "an image; the tokenizer is another model's"
            ) from error
        if pixel_values is None:
            if bool(mask.any()):
                raise DataError(f"the batch has {int(mask.sum())} image placeholders but no pixel_values")
            return Embedded(embeds)
        features = self.encode_images(at_least_one_tile(as_tiles(pixel_values, tile_boxes)))
        tiles, collapse, kept = slice(len(pixel_values)), self.collapse, None
        if collapse is None:
            output = self.connector(features, table.weight, columns=columns)
            log_probs = None if output.log_probs is None else output.log_probs[tiles]
        else:
            wanted = columns.tolist() if isinstance(columns, Tensor) else list(columns or ())
            output = self.connector(features, table.weight, columns=[*wanted, *collapse.tokens])
            log_probs, blank = output.log_probs[tiles].tensor_split([len(wanted)], dim=-1)
            log_probs = None if columns is None else log_probs
            kept = collapse.kept(blank, self.grid, self._thumbnails(thumbnails, len(pixel_values)))
        return Embedded(splice(embeds, mask, output.embeds[tiles], num_tiles, positions=positions), log_probs, kept)

    @property
    def collapse(self) -> Collapse | None:
        """How the connector leaves blanks out; None where it leaves none out."""
        found: Collapse | None = getattr(self.connector, "collapse", None)
        return found if found is not None and found.mass <= 1 else None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of a tile."""
        grid = token_grid(self.config.vision_config, Tiling.from_dict(self.config.tiling))
        return shuffled_grid(grid, shuffle_factor(self.config.connector))

    def _thumbnails(self, given: Tensor | None, tiles: int) -> Tensor | None:
        if given is None and self.config.tiling["thumbnail"] != "none":
            raise DataError(
                f"connector.collapse with tiling.thumbnail={self.config.tiling['thumbnail']!r} needs thumbnails, bool "
                f"of shape ({tiles},), true at tiles of whole images, which keep all tokens; the processor gives them"
            )
        return given

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        tile_boxes: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        visual_positions: Tensor | None = None,
        supervised_positions: Tensor | None = None,
        num_documents: int | None = None,
        document_bounds: Tensor | None = None,
        longest_document: int | None = None,
        thumbnails: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        readout_columns: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> AlignVLMOutput:
        """Run the model.

        Args:
            input_ids: (B, L) ids with `config.image_token_id` at visual positions.
            attention_mask: (B, L), 1 where there is a token.
            position_ids: (B, L) or None.
            past_key_values: Cache.
            inputs_embeds: (B, L, D), instead of `input_ids`.
            pixel_values: (tiles, 3, H, W) of all samples in order: floating point in [-1, 1], or uint8.
            num_tiles: (B,) tiles of each row; checked against the placeholders.
            tile_boxes: (tiles, 4) boxes of the image within uint8 tiles, see `pixels.normalise_tensor`.
            labels: (B, L), `IGNORE_INDEX` where not supervised; shifted inside the model. Placeholders are never
                supervised.
            segment_ids: (B, L) of packed rows: number of the document within its row, from 1; 0 for padding.
                Replaces `attention_mask` and `position_ids`.
            visual_positions: (visual tokens,) indices of the placeholders, see `preprocessing.batch`. This and the next
                four say what a batch's collator knows, so that a GPU is not waited for; None: found in the tensors.
            supervised_positions: (n,) indices of the labels that have a loss.
            num_documents: Documents of the packed rows.
            document_bounds: (documents + 1,) where the documents of packed rows begin.
            longest_document: Tokens of the longest document.
            thumbnails: (tiles,) bool, true at tiles of whole images, of which `connector.collapse` keeps all tokens.
            prompt_embeds: (B, P, D), embeddings of the first P tokens of `input_ids`, as `generate` makes them.
            num_items_in_batch: Supervised positions of all micro batches of a step, by which the loss is divided, not
                by those of this one; transformers' Trainer passes it.
            logits_to_keep: As in transformers: the last n positions only, 0 for all.
            readout_columns: Token ids whose log P_vocab to return; plain numbers are checked without the device.
            **kwargs: Arguments of the LLM's decoder.

        Raises:
            TypeError: If neither the model nor the decoder has an argument of this name.
            DataError: If an input has another type or shape, the numbers of placeholders, tiles and visual tokens do
                not match, uint8 tiles have no `tile_boxes`, packed rows are given with a cache, or labels have another
                shape or ids than the input.
            ConfigError: If the LLM's attention cannot keep packed documents apart.
        """
        decoder: PreTrainedModel = self.language_model.get_decoder()
        if unknown := kwargs.keys() - _decoder_arguments(decoder.__class__):
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        check_inputs(
            self.config,
            past_key_values=past_key_values,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            num_tiles=num_tiles,
            tile_boxes=tile_boxes,
            thumbnails=thumbnails,
            labels=labels,
            segment_ids=segment_ids,
        )
        readout = kept_tokens = None
        if prompt_embeds is not None:
            inputs_embeds = self._continued(prompt_embeds, input_ids)
        elif input_ids is not None:
            visual = {"tile_boxes": tile_boxes, "positions": visual_positions, "thumbnails": thumbnails}
            embedded = self.embed(input_ids, pixel_values, num_tiles, readout_columns, **visual)
            inputs_embeds, readout, kept_tokens = embedded
        assert inputs_embeds is not None  # or input_ids, as checked
        if labels is not None:
            # A collator that knows the positions made the labels itself.
            labels = self._labels(labels, inputs_embeds.shape[:2], checked=supervised_positions is not None)
        by_position: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        by_position |= {"position_ids": position_ids, "segment_ids": segment_ids}
        by_position |= {"labels": labels, "supervised_positions": supervised_positions}
        rows = None
        if kept_tokens is not None:
            assert input_ids is not None  # of which they are the visual tokens
            dropped = dropped_positions(input_ids.eq(self.config.image_token_id), kept_tokens)
            rows, by_position = shorten_inputs(dropped, by_position)
            document_bounds = longest_document = None
        labels, segment_ids, supervised_positions = (
            by_position.pop(name) for name in ("labels", "segment_ids", "supervised_positions")
        )
        if segment_ids is not None:
            by_position |= packed_arguments(
                decoder, by_position["inputs_embeds"], segment_ids, bounds=document_bounds, longest=longest_document
            )
        outputs = decoder(past_key_values=past_key_values, **{**kwargs, **by_position})
        hidden, head = outputs.last_hidden_state, self.get_output_embeddings()
        passed = {name: getattr(outputs, name, None) for name in ("past_key_values", "hidden_states", "attentions")}
        passed |= {"readout_log_probs": readout, "kept_tokens": kept_tokens}
        if labels is not None:
            known: dict[str, Any] = {
                "segment_ids": segment_ids,
                "positions": supervised_positions,
                "num_documents": num_documents,
            }
            loss = supervised_cross_entropy(hidden, labels, head, **known, backend=self.loss_backend)
            divisor = loss.supervised.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return AlignVLMOutput(loss=loss.total / divisor, **passed, **_sums(loss))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        shown = hidden[:, kept] if rows is None else rows.restore(hidden, kept)
        return AlignVLMOutput(logits=head(shown), **passed)

    def _continued(self, prompt_embeds: Tensor, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise DataError("prompt_embeds need input_ids, of whose first tokens they are the embeddings")
        new: Tensor = self.get_input_embeddings()(input_ids[:, prompt_embeds.shape[1] :])
        return torch.cat([prompt_embeds, new], dim=1)

    def _labels(self, labels: Tensor, size: torch.Size, *, checked: bool) -> Tensor:
        labels = labels.masked_fill(labels == self.config.image_token_id, IGNORE_INDEX)
        return check_labels(labels, size, vocabulary=None if checked else self.config.text_config.vocab_size)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; prompts (B, L) have `config.image_token_id` at visual positions, and so has the result.

        The prompt is embedded once. Meanwhile visual positions have another id, see `generation.fill`, and those that
        `connector.collapse` leaves out are not there: logits processors and stopping criteria see the rest.

        Raises:
            ConfigError: A setting is not supported, or has an id that is not in the vocabulary.
            DataError: An input has another type or shape, or a prompt continues a cache, and the tiles are neither
                those of all images nor (without collapse) of the new ones.
        """
        limits = {"image_token_id": self.config.image_token_id, "vocabulary": self.config.text_config.vocab_size}
        given = kwargs.get("generation_config", args[0] if args else None)
        settings = generation.merged_settings(self.generation_config, given, kwargs)
        generation.check_settings(settings, **limits)
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            kwargs["prefix_allowed_tokens_fn"] = generation.checked_prefix(kwargs["prefix_allowed_tokens_fn"], **limits)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is None:
            return super().generate(prompt, *args, **kwargs)
        checked = (*_BY_TILE, "num_tiles", "attention_mask", "position_ids")
        check_inputs(self.config, input_ids=prompt, **{name: kwargs.get(name) for name in checked})
        mask = prompt == self.config.image_token_id
        if kwargs.get("attention_mask") is None and "inputs_embeds" not in kwargs:
            kwargs["attention_mask"] = generation.real_tokens(prompt, settings)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = generation.PromptStreamer(kwargs["streamer"], prompt)
        ids = prompt
        if "inputs_embeds" not in kwargs:
            embedded = self._embed_prompt(prompt, mask, kwargs)
            kwargs["prompt_embeds"] = embedded.embeds
            if embedded.kept is not None:
                real = require_two_axes(kwargs["attention_mask"]).bool()
                rows = shorten(dropped_positions(mask, embedded.kept), real, for_generation=True)
                ids, mask = rows.take(prompt, 0), rows.take(mask, 0)
                for name in {"attention_mask", "position_ids", "prompt_embeds"} & kwargs.keys():
                    kwargs[name] = rows.take(kwargs[name].expand(len(prompt), *kwargs[name].shape[1:]), 0)
                kwargs |= generation.shortened_limits(settings, prompt.shape[1] - ids.shape[1])
        filled = generation.fill(ids, mask, kwargs.get("attention_mask"), settings)
        output = super().generate(filled, *args, **kwargs)
        if isinstance(output, Tensor):
            return generation.with_prompt(output, prompt, ids.shape[1])
        output.sequences = generation.with_prompt(output.sequences, prompt, ids.shape[1])
        return output

    def _embed_prompt(self, prompt: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Embedded:
        """Take the images out of the arguments of `generate`, and return the prompt's embeddings (B, L, D); those of
        tokens in the cache are zero if none of their images is needed.
        """
        images = {name: kwargs.pop(name, None) for name in (*_BY_TILE, "num_tiles")}
        kwargs.pop("visual_positions", None)  # of the batch as it was
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())  # as many tokens are in the cache
        if start and self.collapse is None:
            images, prompt = self._new_images(images, mask, start), prompt[:, start:]
        elif start:
            self._require_all_images(images["pixel_values"], mask)
        embedded: Embedded = self.embed_prompt(prompt, **images)
        behind = mask.shape[1] - embedded.embeds.shape[1]
        return embedded._replace(embeds=F.pad(embedded.embeds, (0, 0, behind, 0)) if behind else embedded.embeds)

    @torch.no_grad()
    def embed_prompt(
        self, input_ids: Tensor, pixel_values: Tensor | None, num_tiles: Tensor | None, **by_tile: Tensor | None
    ) -> Embedded:
        """Return what `embed` does, without gradient, for `generate`."""
        return self.embed(input_ids, pixel_values, num_tiles, None, **by_tile)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, prompt_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of one decoding step, with the embeddings (B, n, D) of n tokens of the prompt among them.

        `prompt_embeds` (B, P, D) are those of the whole prompt.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        for name in ("tokenizer", "assistant_tokenizer"):  # of `generate`, which transformers passes on
            inputs.pop(name, None)
        if inputs.get("input_ids") is None or prompt_embeds is None:
            return inputs
        start = input_ids.shape[1] - inputs["input_ids"].shape[1]  # as many are in the cache
        return inputs if start >= prompt_embeds.shape[1] else inputs | {"prompt_embeds": prompt_embeds[:, start:]}

    def _new_images(self, images: dict[str, Any], mask: Tensor, start: int) -> dict[str, Any]:
        """Return the images whose placeholders are at `start` or behind, where the cache ends."""
        size, pixels = self.config.tokens_per_tile, images["pixel_values"]
        old, new = (part.sum(dim=1) // size for part in (mask[:, :start], mask[:, start:]))
        if not bool(new.any()):
            return dict.fromkeys(images)
        found, counts = 0 if pixels is None else len(pixels), (int(old.sum()), int(new.sum()))
        if found not in (sum(counts), counts[1]):
            raise DataError(
                f"the prompt continues a cache with {counts[0]} tiles in it and has {counts[1]} new ones, but "
                f"pixel_values has {found}; pass the tiles of all images of the conversation, or of the new ones"
            )
        if found == counts[1]:
            return {**images, "num_tiles": new}
        rows = zip(old.tolist(), (old + new).tolist(), strict=True)
        kept = torch.cat([torch.arange(total) >= before for before, total in rows])
        found_images = {name: images[name] for name in _BY_TILE if images.get(name) is not None}
        chosen = {name: values[kept.to(values.device)] for name, values in found_images.items()}
        return {**images, **chosen, "num_tiles": new}

    def _require_all_images(self, pixel_values: Tensor | None, mask: Tensor) -> None:
        tiles, found = int(mask.sum()) // self.config.tokens_per_tile, 0 if pixel_values is None else len(pixel_values)
        if found != tiles:
            raise DataError(
                f"the prompt continues a cache and has the placeholders of {tiles} tiles, but pixel_values has "
                f"{found}; with connector.collapse pass the tiles of all images of the conversation, which "
                "say how many tokens of each are in the cache"
            )


def _sums(loss: TokenLoss) -> dict[str, Any]:
    return {
        "loss_sum": loss.total,
        "num_supervised": loss.supervised,
        "document_loss_sums": loss.document_sums,
        "document_supervised": loss.document_supervised,
    }


@lru_cache(maxsize=64)
def _decoder_arguments(decoder: type[PreTrainedModel]) -> frozenset[str]:
    """Return the names of the arguments of a decoder's forward, those of all attentions included."""
    own = signature(decoder.forward).parameters
    return frozenset(own) | frozenset(TransformersKwargs.__annotations__) | {"cache_position"}


def connector_from_config(config: AlignVLMConfig) -> nn.Module:
    """Build the connector of a configuration; raise a `ConfigError` if an option is invalid."""
    vision, text = config.vision_config, config.text_config
    has_grid = getattr(vision, "patch_size", None) is not None
    return build_connector(
        config.connector,
        vision_dim=vision.hidden_size,
        text_dim=text.hidden_size,
        vocab_size=text.vocab_size,
        grid=token_grid(vision, Tiling.from_dict(config.tiling)) if has_grid else None,
    )


def connector_features(tower: nn.Module, pixel_values: Tensor, config: AlignVLMConfig) -> Tensor:
    """Return the vision features (tiles, tokens, d) of pixel values (tiles, 3, H, W), after the pixel shuffle; the
    tower runs in its own dtype.

    Raises:
        ConfigError: If the features do not have the connector's width, or do not fill a grid.
    """
    features: Tensor = tower(pixel_values=pixel_values.to(next(tower.parameters()).dtype)).last_hidden_state
    if features.shape[-1] != config.vision_config.hidden_size:
        raise ConfigError(
            f"the vision tower gives features of width {features.shape[-1]}, but the connector reads width "
            f"{config.vision_config.hidden_size} (hidden_size of {config.vision_config.model_type})"
        )
    if (factor := shuffle_factor(config.connector)) == 1:
        return features
    return pixel_shuffle(features, patch_grid(config.vision_config, *pixel_values.shape[-2:]), factor)
