"""The LLM's input sequence: visual tokens at their placeholders, and documents packed into one row."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..errors import ConfigError, DataError
from ..ops.linear_cross_entropy import compute_dtype
from ..preprocessing.batch import document_bounds, visual_positions
from ..preprocessing.chat import IGNORE_INDEX

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


class Shortened(NamedTuple):
    """A batch of rows (B, L) without some of their positions, as rows (B, S), see `shorten`.

    `sources` (B, S) has the position that each comes from, and `filled` (B, S) is false at padding, which is left of a
    row if `left`. `places` (B, L) has the place of each position, or of the last before it that is kept. With
    `padded_right` every row was tokens, then padding.
    """

    sources: Tensor
    filled: Tensor
    places: Tensor
    left: bool
    padded_right: bool

    def take(self, values: Tensor, padding: float) -> Tensor:
        """Return (B, S, …) of values (B, L, …), and `padding` where there is none."""
        shape = (*self.sources.shape, *[1] * (values.ndim - 2))
        taken = values.gather(1, self.sources.view(shape).expand(*self.sources.shape, *values.shape[2:]))
        return taken.masked_fill(~self.filled.view(shape), padding)

    def restore(self, values: Tensor, positions: Any) -> Tensor:
        """Return values (B, S, D) at `positions`, an index into the L of the batch, as (B, n, D)."""
        places = self.places[:, positions]
        return values.gather(1, places[..., None].expand(*places.shape, values.shape[2]))


def dropped_positions(placeholders: Tensor, kept: Tensor) -> Tensor:
    """Return the positions (B, L) of visual tokens that are not `kept` (tiles, tokens), of `placeholders` (B, L)."""
    return torch.zeros_like(placeholders).masked_scatter(placeholders, ~kept)


def shorten_inputs(dropped: Tensor, inputs: dict[str, Any]) -> tuple[Shortened, dict[str, Any]]:
    """Leave positions `dropped` (B, L) out of the inputs of a forward, each of which may be None.

    They are `inputs_embeds` (B, L, D), `labels`, `segment_ids`, `position_ids` and `attention_mask` (B, L), the mask
    with the tokens of a cache before them, and `supervised_positions` (n,) among the B · L.

    Raises:
        DataError: The attention mask does not have two axes.
    """
    size, mask, segments = dropped.shape[1], inputs["attention_mask"], inputs["segment_ids"]
    if mask is not None:
        require_two_axes(mask)
    if segments is not None:
        real = segments > 0
    else:
        real = torch.ones_like(dropped) if mask is None else mask[:, -size:].bool()
    rows, taken = shorten(dropped, real), dict(inputs)
    for name, padding in (("inputs_embeds", 0), ("labels", IGNORE_INDEX), ("segment_ids", 0), ("position_ids", 0)):
        if (values := inputs[name]) is not None:
            taken[name] = rows.take(values.expand(len(dropped), *values.shape[1:]), padding)
    if mask is not None:
        taken["attention_mask"] = mask = torch.cat([mask[:, :-size], rows.take(mask[:, -size:], 0)], dim=1)
        if rows.left and inputs["position_ids"] is None:
            taken["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -rows.sources.shape[1] :]
        if rows.padded_right and mask.shape[1] == rows.sources.shape[1]:
            # Tokens do not see padding behind them, and CUDA's flash attention does not run with a mask.
            taken["attention_mask"] = None
    if (positions := inputs["supervised_positions"]) is not None:
        places = rows.places.flatten().index_select(0, positions)
        taken["supervised_positions"] = places + positions // size * rows.sources.shape[1]
    return rows, taken


def require_two_axes(mask: Any) -> Tensor:
    """Return an attention mask (B, L); raise a `DataError` for one of another form."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    raise DataError("connector.collapse takes an attention_mask (rows, tokens), which is shortened with the rows")


def shorten(dropped: Tensor, real: Tensor, *, for_generation: bool = False) -> Shortened:
    """Leave positions `dropped` (B, L) out of a batch, and the padding that no row needs then.

    `real` (B, L) is true where there is a token. Rows are padded on the left if a row was, or `for_generation`, whose
    prompts end together, else on the right; padding elsewhere stays. A GPU is waited for, once: the longest row decides
    the shape.
    """
    from_left, from_right = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
    left_padded = torch.ones_like(real[0, 0]) if for_generation else ~real[:, 0].all()
    kept = ~dropped & (torch.where(left_padded, from_left, from_right) > 0)
    counts = kept.sum(dim=1)
    padded_right = (real[:, 1:] <= real[:, :-1]).all()
    longest, left, right = torch.stack([counts.amax().clamp(min=1), left_padded, padded_right]).tolist()
    length = int(longest)
    # A stable sort keeps the order of the positions; what is left out comes first or last, and is cut off.
    order = (kept if left else ~kept).to(torch.uint8).argsort(dim=1, stable=True)
    sources = order[:, -length:] if left else order[:, :length]
    column = torch.arange(length, device=real.device)
    free = length - counts[:, None]
    filled = column >= free if left else column < counts[:, None]
    places = kept.cumsum(1) - 1 + (free if left else 0)
    return Shortened(sources, filled, places.clamp(min=0), bool(left), bool(right))


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
