"""Packed rows: several documents one after another, each with its own positions and blind to the others."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..errors import ConfigError

PACKABLE_ATTENTIONS = ("eager", "flash_attention_2", "flex_attention", "sdpa")
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


def document_positions(segment_ids: Tensor) -> Tensor:
    """Positions (R, L) that restart at 0 with every document.

    The padding at a row's end counts as one more document, so that it sees something: a softmax over nothing is NaN.

    Args:
        segment_ids: (R, L), the number of the document within its row from 1, 0 for padding.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (segment_ids[:, 1:] != segment_ids[:, :-1])
    return index - starts.cummax(dim=1).values


def packed_arguments(decoder: PreTrainedModel, inputs_embeds: Tensor, segment_ids: Tensor) -> dict[str, Any]:
    """Arguments that make an LLM's decoder attend causally within each document only.

    Args:
        decoder: The LLM without its head.
        inputs_embeds: (R, L, D).
        segment_ids: See `document_positions`.

    Returns:
        `position_ids`, and the attention mask in the form of the decoder's attention: boolean for sdpa, added to
        the scores for eager, blocks for flex, the bounds of the documents for flash attention.

    Raises:
        ConfigError: If the attention, or a kind of layer, is not known to keep documents apart.
    """
    require_packable(decoder)
    positions = document_positions(segment_ids)
    arguments = {"position_ids": positions, "use_cache": False}
    if decoder.config._attn_implementation == "flash_attention_2":
        return {**arguments, "attention_mask": None, **_flash_bounds(positions)}
    # CONTRACT (transformers): positions that restart, without a mask and a cache, mean packed documents.
    mask = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return {**arguments, "attention_mask": mask}


def require_packable(decoder: PreTrainedModel) -> None:
    """Refuse an LLM whose documents in one row would see each other.

    Raises:
        ConfigError: Naming the attention or the kind of layer, and what works.
    """
    config = decoder.config
    attention = config._attn_implementation
    if attention not in PACKABLE_ATTENTIONS:
        raise ConfigError(
            f"model.attention={attention!r} is not known to keep packed documents apart; "
            f"use one of {', '.join(PACKABLE_ATTENTIONS)}, or batches that are not packed"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if getattr(config, "attention_chunk_size", None) is not None:
        layers.add("chunked_attention")
    if getattr(decoder, "_is_stateful", False):
        layers.add("a recurrent state")
    if layers:
        raise ConfigError(
            f"packed batches work with layers of full or sliding attention only, and {config.model_type} has "
            f"{', '.join(sorted(layers))}; use batches that are not packed"
        )


def _flash_bounds(positions: Tensor) -> dict[str, Any]:
    """Documents of all rows as one sequence, in the names of transformers' `FlashAttentionKwargs`."""
    flat = positions.flatten()
    bounds = torch.cat([torch.nonzero(flat == 0).flatten(), flat.new_tensor([len(flat)])]).to(torch.int32)
    longest = int(flat.max()) + 1
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
