"""Types and shapes of the model's inputs, checked before anything runs and without waiting for a device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..preprocessing.tiling import Tiling
from .configuration import AlignVLMConfig

_IDS = (torch.int64, torch.int32)
_NO_TENSOR = (np.ndarray, list, tuple, str, int, float)
"""What an attention mask is not: decoders also take masks by kind of layer, and block masks."""


def check_inputs(config: AlignVLMConfig, *, past_key_values: Any = None, **given: Any) -> None:
    """Check the inputs of `forward` and `generate`, by name; None: not given.

    An attention mask (B, L) covers the tokens in the cache `past_key_values`, too.

    Raises:
        DataError: One is no tensor, or has another shape or dtype, naming it, what was expected and what was found.
    """
    require_tensors(given)
    if past_key_values is not None and not hasattr(past_key_values, "get_seq_length"):
        found = type(past_key_values).__name__
        raise DataError(f"past_key_values is of type {found}, expected a Cache of transformers")
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    first = embeds if ids is None else ids
    if first is None or (ids is not None and embeds is not None):
        raise DataError("the model needs input_ids or inputs_embeds, and not both")
    if ids is not None:
        _require("input_ids", ids, "(rows, tokens)", (None, None), _IDS)
    else:
        width = config.text_config.hidden_size
        _require("inputs_embeds", embeds, f"(rows, tokens, {width})", (None, None, width))
        if given.get("pixel_values") is not None:
            raise DataError("pixel_values are given with inputs_embeds, which hold the visual tokens; leave one out")
    if given.get("segment_ids") is not None and (past_key_values is not None or given.get("position_ids") is not None):
        raise DataError("packed rows (segment_ids) take neither a cache nor position_ids")
    rows, tokens = map(int, first.shape[:2])
    if not rows or not tokens:
        name = "inputs_embeds" if ids is None else "input_ids"
        raise DataError(f"{name} have shape {tuple(first.shape)}, expected (rows, tokens) of at least one token")
    _require("segment_ids", given.get("segment_ids"), f"{(rows, tokens)}, as the input", (rows, tokens))
    positions = given.get("position_ids")
    first_row = 1 if positions is not None and len(positions) == 1 else rows
    _require("position_ids", positions, f"{(rows, tokens)}, as the input", (first_row, tokens), _IDS)
    _require("num_tiles", given.get("num_tiles"), f"{(rows,)}, tiles of each row", (rows,), _IDS)
    tiles = check_tiles(config, given.get("pixel_values"))
    _require("thumbnails", given.get("thumbnails"), f"({tiles},), one for each tile", (tiles,), (torch.bool,))
    _check_mask(given.get("attention_mask"), rows, tokens, past_key_values)


def require_tensors(given: Mapping[str, Any]) -> None:
    """Raise a `DataError` if an input is no tensor, naming it."""
    for name, value in given.items():
        is_mask = name == "attention_mask" and not isinstance(value, _NO_TENSOR)
        if not isinstance(value, (Tensor, type(None))) and not is_mask:
            raise DataError(
                f"{name} is of type {type(value).__name__}, expected a torch tensor; the processor gives them with "
                "return_tensors='pt'"
            )


def check_tiles(config: AlignVLMConfig, pixel_values: Tensor | None) -> int:
    """Return the number of tiles; raise a `DataError` if they have another shape than the tiling's."""
    tiling = Tiling.from_dict(config.tiling)
    tile = (3, tiling.tile_height, tiling.tile_width)
    _require("pixel_values", pixel_values, f"(tiles, {', '.join(map(str, tile))})", (None, *tile))
    return 0 if pixel_values is None else len(pixel_values)


def _check_mask(mask: Any, rows: int, tokens: int, cache: Any) -> None:
    if not isinstance(mask, Tensor):
        return
    past = 0 if cache is None else cache.get_seq_length()
    # A static cache has its length on the device.
    keys = past + tokens if isinstance(past, int) else None
    if mask.ndim == 4:  # as transformers makes it of one with two axes
        words = f"(rows, heads, {tokens}, keys) or {(rows, keys)}"
        _require("attention_mask", mask, words, (None, None, tokens, None if cache is not None else keys))
        if not (mask.is_floating_point() or mask.dtype == torch.bool):
            raise DataError(f"attention_mask (4 axes) is of {mask.dtype}, expected bool or floating point")
    else:
        cached = "" if cache is None else f", {past} of them in the cache"
        _require("attention_mask", mask, f"{(rows, keys)}: one entry for each token{cached}", (rows, keys))


def _require(
    name: str, value: Any, words: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise a `DataError` unless a tensor, if there is one, has this shape (None: any length) and dtype."""
    if value is None:
        return
    same = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or any(size not in (found, None) for found, size in same):
        raise DataError(f"{name} have shape {tuple(value.shape)}, expected {words}")
    if dtypes and value.dtype not in dtypes:
        raise DataError(f"{name} are of {value.dtype}, expected {' or '.join(map(str, dtypes))}")
