"""Prune ALIGN's vocabulary: measure the probability mass of its rows, and keep or restore rows of a model.

The paper finds nearly all of P_vocab on about 3.4K of 128K tokens, and the same scores with these alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..ops import vocabulary_mass
from .align import AlignConnector
from .connectors import build_connector
from .kept_rows import check_kept
from .modeling import AlignVLMForConditionalGeneration


@torch.inference_mode()
def mean_vocabulary(model: AlignVLMForConditionalGeneration, images: Iterable[Tensor]) -> tuple[list[float], int]:
    """Return the mean P_vocab of each row over the visual tokens of images, and their number.

    `model` is in eval mode, `images` are pixel values (tiles, 3, H, W) of each image.

    Raises:
        ConfigError: If the connector is not ALIGN.
        DataError: If there are no visual tokens, or the vision tower's number of them is not the configured one.
    """
    connector = require_align(model)
    norm, head, tokens = connector.norm2, connector.w2.weight, 0
    total = torch.zeros(connector.rows, dtype=torch.float64, device=head.device)
    for pixel_values in images:
        if not len(pixel_values):
            continue
        features = model.encode_images(pixel_values.to(head.device))
        hidden = connector.norm1(connector.w1(features)).flatten(0, -2)
        total += vocabulary_mass(hidden, head, norm.weight, norm.bias, eps=norm.eps)
        tokens += len(hidden)
    if not tokens:
        raise DataError("there were no visual tokens: the samples have no images; use a dataset with images")
    return (total / tokens).tolist(), tokens


def require_align(model: AlignVLMForConditionalGeneration) -> AlignConnector:
    """Return the model's connector; raise a `ConfigError` if it is not ALIGN."""
    if not isinstance(model.connector, AlignConnector):
        raise ConfigError(
            f"connector {model.config.connector.get('type')!r} has no vocabulary to prune; only 'align' has"
        )
    return model.connector


@torch.no_grad()
def transfer_rows(source: AlignConnector, target: AlignConnector, head_weight: Tensor) -> int:
    """Copy a connector into one that keeps other rows.

    W1 and its norm are copied, and so are W2, gain and bias of the rows that both keep; their number is returned. Rows
    that the source lacks are initialised from the LM head (V, D), as in a new connector. Both connectors have the same
    widths, and hold full, unsharded weights.

    Raises:
        ConfigError: If the vocabularies of the two differ.
    """
    if source.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the connector's weights are of a vocabulary of {source.vocab_size}, the model has {target.vocab_size}; "
            "rows can be kept and restored within one LLM only"
        )
    target.initialize(head_weight)
    target.w1.load_state_dict(source.w1.state_dict())
    target.norm1.load_state_dict(source.norm1.state_dict())
    source_index = {row: index for index, row in enumerate(source.row_ids())}
    pairs = [(source_index[row], index) for index, row in enumerate(target.row_ids()) if row in source_index]
    if not pairs:
        return 0
    read, write = torch.tensor(pairs, device=source.w2.weight.device).T
    new_rows, old_rows = ((one.w2.weight, one.norm2.weight, one.norm2.bias) for one in (target, source))
    for new, old in zip(new_rows, old_rows, strict=True):
        new[write.to(new.device)] = old[read].to(new)
    return len(pairs)


def prune(model: AlignVLMForConditionalGeneration, kept: Iterable[int] | None) -> None:
    """Keep only these rows of the vocabulary, in place; config and weights of the model change.

    None restores the whole vocabulary of a pruned model: kept rows as trained, the others from the LM head.

    Raises:
        ConfigError: If ids are invalid, or the connector is not ALIGN.
    """
    old = require_align(model)
    options = {key: value for key, value in model.config.connector.items() if key not in ("vocab_rows", "vocab_keep")}
    if kept is not None:
        options["vocab_keep"] = list(check_kept(list(kept), old.vocab_size, where="prune"))
    new = build_connector(
        options, vision_dim=old.w1.in_features, text_dim=old.w1.out_features, vocab_size=old.vocab_size
    )
    assert isinstance(new, AlignConnector), "the options are those of an ALIGN connector"
    new.to(device=old.w2.weight.device, dtype=old.w2.weight.dtype).train(old.training)
    head: Any = model.get_output_embeddings()
    transfer_rows(old, new, head.weight.data)
    for fresh, parameter in zip(new.parameters(), old.parameters(), strict=True):
        fresh.requires_grad_(parameter.requires_grad)
    model.connector, model.config.connector = new, options
