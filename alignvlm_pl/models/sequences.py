"""The LLM's input sequence: visual tokens at their placeholders, and documents packed into one row."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..errors import ConfigError, DataError
from ..ops.linear_cross_entropy import compute_dtype
from ..preprocessing.batch import document_bounds, visual_positions

PACKABLE_ATTENTIONS = ("eager", "flash_attention_2", "flex_attention", "sdpa")
_ALIGNMENT = 16
"""Elements that a row of an attention mask is a multiple of in memory: CUDA's kernels copy masks with other rows."""


def splice(
    embeds: Tensor, mask: Tensor, visual: Tensor, num_tiles: Tensor | None = None, *, positions: Tensor | None = None
) -> Tensor:
    """Replace the embeddings at placeholder positions by visual tokens (paper, equation 3), in their dtype.

    `embeds` are (B, L, D), and `mask` (B, L) is true at placeholders, in reading order of the tiles of `visual` (tiles,
    tokens, D); without `num_tiles` (B,) only the totals are checked. `positions` (tiles · tokens,) of the placeholders,
    see `preprocessing.batch.visual_positions`, are else found in `mask`, for which a GPU is waited for.

    Raises:
        DataError: If the numbers of placeholders and visual tokens differ, naming both (and the sample).
    """
    tiles, tokens, width = visual.shape
    if positions is None:
        positions = visual_positions(mask, num_tiles, tokens_per_tile=tokens)
    if len(positions) != tiles * tokens:
        raise DataError(
            f"the batch has {len(positions)} image placeholders but {tiles} tiles give {tiles * tokens} visual tokens "
            f"({tokens} a tile); processor and model disagree on tiling or tokens_per_tile"
        )
    # `index_copy` would keep the visual tokens for backward.
    spliced = embeds.flatten(0, 1).index_put((positions,), visual.reshape(-1, width).to(embeds.dtype))
    return spliced.view_as(embeds)


def document_positions(segment_ids: Tensor) -> Tensor:
    """Return positions (R, L) that restart at 0 with every document of `segment_ids` (R, L), see `forward`.

    The padding at the end of a row counts as a separate document, because a softmax over no position is NaN.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (segment_ids[:, 1:] != segment_ids[:, :-1])
    return index - starts.cummax(dim=1).values


def packed_arguments(
    decoder: PreTrainedModel,
    inputs_embeds: Tensor,
    segment_ids: Tensor,
    *,
    bounds: Tensor | None = None,
    longest: int | None = None,
) -> dict[str, Any]:
    """Return the decoder arguments under which attention is causal within each document and zero across documents.

    `decoder` is the LLM without its head, for `inputs_embeds` (R, L, D) and `segment_ids` (R, L). Flash attention
    reads `bounds` (documents + 1,), see `preprocessing.batch.document_bounds`, and the tokens of the `longest`
    document; where they are None they are found in `segment_ids`, for which a GPU is waited for.

    Returns:
        `position_ids`, `use_cache`, and the mask in the form of the decoder's attention, see `require_packable`:
        additive for sdpa and eager, a block mask for flex attention, document boundaries for flash attention.
    """
    attention = require_packable(decoder)
    arguments = {"position_ids": document_positions(segment_ids), "use_cache": False}
    if attention == "flash_attention_2":
        if bounds is None or longest is None:
            bounds = document_bounds(segment_ids)
            longest = int(bounds.diff().max())
        lengths = {"max_length_q": longest, "max_length_k": longest}
        return {**arguments, "attention_mask": None, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}

    def same_document(row: Any, head: Any, query: Any, key: Any) -> Any:
        return segment_ids[row, query] == segment_ids[row, key]

    # Given positions instead, transformers would read from the device whether they restart.
    mask = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        and_mask_function=same_document,
    )
    if attention == "sdpa":
        additive = partial(additive_mask, dtype=compute_dtype(inputs_embeds))
        by_kind = isinstance(mask, dict)  # of models with several kinds of layers
        mask = {kind: additive(seen) for kind, seen in mask.items()} if by_kind else additive(mask)
    return {**arguments, "attention_mask": mask}


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask (R, 1, L, L) of 0 where `seen` is true and -inf elsewhere, made once for all layers.

    From a boolean mask, and from one whose rows are not aligned, scaled_dot_product_attention makes another in each
    layer, which autograd keeps.
    """
    size = seen.shape[-1]
    aligned = seen.new_zeros((*seen.shape[:-1], -(-size // _ALIGNMENT) * _ALIGNMENT), dtype=dtype)
    return aligned[..., :size].masked_fill_(~seen, float("-inf"))


def require_packable(decoder: PreTrainedModel) -> str:
    """Return the name of the decoder's attention; raise a `ConfigError` if it cannot keep packed documents apart."""
    config = decoder.config
    # transformers has a public setter (set_attn_implementation) and no public getter.
    attention: str = config._attn_implementation
    if attention not in PACKABLE_ATTENTIONS:
        raise ConfigError(
            f"model.attention={attention!r} is not known to keep packed documents apart; "
            f"use one of {', '.join(PACKABLE_ATTENTIONS)}, or batches that are not packed"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
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
