"""Prune ALIGN's vocabulary: measure the probability mass of its rows, and keep or restore rows of a model.

The paper finds nearly all of P_vocab on about 3.4K of 128K tokens, and the same scores with these alone. Norm and
softmax run over the kept rows, so the weights sum to one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..ops import vocabulary_mass
from .align import AlignConnector
from .connectors import build_connector
from .kept_rows import check_kept
from .modeling import AlignVLMForConditionalGeneration


@dataclass
class VocabularyShares:
    """Sum (rows,) of P_vocab over visual tokens in float64, and their number."""

    total: Tensor
    tokens: int = 0

    def mean(self) -> list[float]:
        """Return the mean P_vocab of each row.

        Raises:
            DataError: If there were no visual tokens.
        """
        if not self.tokens:
            raise DataError("there were no visual tokens: the samples have no images; use a dataset with images")
        shares: list[float] = (self.total / self.tokens).tolist()
        return shares


@torch.inference_mode()
def sum_vocabulary(model: AlignVLMForConditionalGeneration, images: Iterable[Tensor]) -> VocabularyShares:
    """Sum P_vocab over the visual tokens of images.

    Args:
        model: A model with an ALIGN connector, in eval mode.
        images: Pixel values (tiles, 3, H, W) of each image.

    Raises:
        ConfigError: If the connector is not ALIGN.
        DataError: If the vision tower's number of tokens is not the configured one.
    """
    connector = require_align(model)
    device = connector.w2.weight.device
    shares = VocabularyShares(torch.zeros(connector.rows, dtype=torch.float64, device=device))
    for pixel_values in images:
        if not len(pixel_values):
            continue
        features = model.encode_images(pixel_values.to(device))
        hidden = connector.norm1(connector.w1(features)).flatten(0, -2)
        norm = connector.norm2
        shares.total += vocabulary_mass(hidden, connector.w2.weight, norm.weight, norm.bias, eps=norm.eps)
        shares.tokens += len(hidden)
    return shares


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

    W1 and its norm are copied, and so are W2, gain and bias of the rows that both keep. Rows that the source lacks are
    initialised from the LM head, as in a new connector. Both connectors must hold full, unsharded weights.

    Args:
        source: The trained connector.
        target: A connector of the same widths and vocabulary; overwritten.
        head_weight: (V, D) weight of the LLM's head.

    Returns:
        Number of rows copied from the source.

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
    for new, old in (
        (target.w2.weight, source.w2.weight),
        (target.norm2.weight, source.norm2.weight),
        (target.norm2.bias, source.norm2.bias),
    ):
        new[write.to(new.device)] = old[read].to(new)
    return len(pairs)


def prune(model: AlignVLMForConditionalGeneration, kept: Iterable[int]) -> None:
    """Keep only these rows of the vocabulary, in place; config and weights of the model change.

    Raises:
        ConfigError: If ids are invalid, or the connector is not ALIGN.
    """
    ids = check_kept(list(kept), require_align(model).vocab_size, where="prune")
    _rebuild(model, {"vocab_keep": list(ids)})


def unprune(model: AlignVLMForConditionalGeneration) -> None:
    """Restore the full vocabulary of a pruned model, in place: kept rows as trained, the others from the LM head.

    Raises:
        ConfigError: If the connector is not ALIGN.
    """
    _rebuild(model, {})


def _rebuild(model: AlignVLMForConditionalGeneration, rows: dict[str, list[int]]) -> None:
    old = require_align(model)
    options = {key: value for key, value in model.config.connector.items() if key not in ("vocab_rows", "vocab_keep")}
    options |= rows
    new = build_connector(
        options, vision_dim=old.w1.in_features, text_dim=old.w1.out_features, vocab_size=old.vocab_size
    )
    assert isinstance(new, AlignConnector), "the options are those of an ALIGN connector"
    new.to(device=old.w2.weight.device, dtype=old.w2.weight.dtype).train(old.training)
    head: Any = model.get_output_embeddings()
    transfer_rows(old, new, head.weight.data)
    for (_, fresh), (_, parameter) in zip(new.named_parameters(), old.named_parameters(), strict=True):
        fresh.requires_grad_(parameter.requires_grad)
    model.connector, model.config.connector = new, options
