"""The LLM's input sequence: visual tokens at their placeholders, and documents packed into one row."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..errors import ConfigError, DataError

PACKABLE_ATTENTIONS = ("eager", "flash_attention_2", "flex_attention", "sdpa")
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


def splice(embeds: Tensor, mask: Tensor, visual: Tensor, num_tiles: Tensor | None = None) -> Tensor:
    """Replace the embeddings at placeholder positions by visual tokens (paper, equation 3).

    Args:
        embeds: (B, L, D) token embeddings.
        mask: (B, L) bool, true at placeholders, in reading order of the tiles.
        visual: (tiles, tokens, D) visual tokens of the whole batch.
        num_tiles: (B,) tiles of each sample, or None to check the totals only.

    Returns:
        (B, L, D) in the dtype of `embeds`.

    Raises:
        DataError: If the numbers of placeholders and visual tokens differ, naming both (and the sample).
    """
    tiles, tokens, width = visual.shape
    if num_tiles is not None:
        if len(num_tiles) != len(mask):
            raise DataError(f"num_tiles has {len(num_tiles)} entries but the batch has {len(mask)} samples")
        found = mask.sum(dim=1)
        mismatched = torch.nonzero(found != num_tiles * tokens).flatten().tolist()
        if mismatched:
            row = mismatched[0]
            raise DataError(
                f"sample {row} of the batch has {int(found[row])} image placeholders but its {int(num_tiles[row])} "
                f"tiles give {int(num_tiles[row]) * tokens} visual tokens ({tokens} a tile); processor and model "
                "disagree on tiling or tokens_per_tile"
            )
    if int(mask.sum()) != tiles * tokens:
        raise DataError(
            f"the batch has {int(mask.sum())} image placeholders but {tiles} tiles give {tiles * tokens} visual tokens "
            f"({tokens} a tile); processor and model disagree on tiling or tokens_per_tile"
        )
    return embeds.masked_scatter(mask.unsqueeze(-1), visual.reshape(-1, width).to(embeds.dtype))


def document_positions(segment_ids: Tensor) -> Tensor:
    """Return positions (R, L) that restart at 0 with every document.

    The padding at the end of a row counts as a separate document, because a softmax over no position is NaN.

    Args:
        segment_ids: (R, L) number of the document within its row, starting at 1; 0 for padding.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (segment_ids[:, 1:] != segment_ids[:, :-1])
    return index - starts.cummax(dim=1).values


def packed_arguments(decoder: PreTrainedModel, inputs_embeds: Tensor, segment_ids: Tensor) -> dict[str, Any]:
    """Return the decoder arguments under which attention is causal within each document and zero across documents.

    Args:
        decoder: The LLM without its head.
        inputs_embeds: (R, L, D).
        segment_ids: See `document_positions`.

    Returns:
        `position_ids`, `use_cache`, and the mask in the form of the decoder's attention: boolean for sdpa, additive for
        eager, a block mask for flex attention, document boundaries for flash attention.

    Raises:
        ConfigError: See `require_packable`.
    """
    attention = require_packable(decoder)
    positions = document_positions(segment_ids)
    arguments = {"position_ids": positions, "use_cache": False}
    if attention == "flash_attention_2":
        return {**arguments, "attention_mask": None, **_flash_bounds(positions)}
    # transformers takes positions that restart, without mask and cache, for packed documents.
    mask = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return {**arguments, "attention_mask": mask}


def require_packable(decoder: PreTrainedModel) -> str:
    """Return the name of the decoder's attention, if it can keep the documents of a packed row apart.

    Raises:
        ConfigError: The attention or a kind of layer is not known to do so; the message lists those that are.
    """
    config = decoder.config
    # transformers has a public setter (set_attn_implementation) and no public getter.
    attention: str = config._attn_implementation
    if attention not in PACKABLE_ATTENTIONS:
        raise ConfigError(
            f"model.attention={attention!r} is not known to keep packed documents apart; "
            f"use one of {', '.join(PACKABLE_ATTENTIONS)}, or batches that are not packed"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if getattr(config, "attention_chunk_size", None) is not None:
        layers.add("chunked_attention")
    if getattr(decoder, "_is_stateful", False):  # the only sign of a recurrent model; private in transformers
        layers.add("a recurrent state")
    if layers:
        raise ConfigError(
            f"packed batches work with layers of full or sliding attention only, and {config.model_type} has "
            f"{', '.join(sorted(layers))}; use batches that are not packed"
        )
    return attention


def _flash_bounds(positions: Tensor) -> dict[str, Any]:
    """Return the boundaries of all documents, the rows joined, as transformers' `FlashAttentionKwargs`."""
    flat = positions.flatten()
    bounds = torch.cat([torch.nonzero(flat == 0).flatten(), flat.new_tensor([len(flat)])]).to(torch.int32)
    longest = int(flat.max()) + 1
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}
