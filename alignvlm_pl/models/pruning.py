"""Pruning ALIGN's vocabulary: which rows carry the mass, and moving a connector between sets of rows.

The paper finds about 3.4K of 128K tokens to carry nearly all of P_vocab, and a model on these alone to score the same.
Norm and softmax run over the rows that are kept, so the weights sum to one again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..ops import vocabulary_mass
from .align import AlignConnector
from .kept_rows import check_kept
from .modeling import AlignVLMForConditionalGeneration


@dataclass
class VocabularyShares:
    """Sums of P_vocab over visual tokens.

    Args:
        total: (rows,) float64.
        tokens: Visual tokens seen.
    """

    total: Tensor
    tokens: int = 0

    def mean(self) -> list[float]:
        """Mean P_vocab of each row.

        Raises:
            DataError: If no visual token has been seen.
        """
        if not self.tokens:
            raise DataError("no visual token was seen: the samples have no images; give a set with images")
        shares: list[float] = (self.total / self.tokens).tolist()
        return shares


@torch.inference_mode()
def calibrate(model: AlignVLMForConditionalGeneration, images: Iterable[Tensor]) -> VocabularyShares:
    """Add up P_vocab over the visual tokens of images.

    Args:
        model: A model with an ALIGN connector, in eval mode.
        images: Pixel values (tiles, 3, H, W), one after the other.

    Raises:
        ConfigError: If the connector has no P_vocab.
        DataError: If the vision tower yields another number of tokens than the model was built for.
    """
    connector = require_align(model)
    device = connector.w2.weight.device
    shares = VocabularyShares(torch.zeros(connector.rows, dtype=torch.float64, device=device))
    for pixel_values in images:
        if not len(pixel_values):
            continue
        features = model.encode_images(pixel_values.to(device))
        hidden = connector.norm1(connector.w1(features)).flatten(0, -2)
        shares.total += vocabulary_mass(
            hidden,
            connector.w2.weight,
            connector.norm2.weight,
            connector.norm2.bias,
            eps=connector.norm2.eps,
        )
        shares.tokens += len(hidden)
    return shares


def require_align(model: AlignVLMForConditionalGeneration) -> AlignConnector:
    """The model's ALIGN connector.

    Raises:
        ConfigError: If it has another one.
    """
    if not isinstance(model.connector, AlignConnector):
        raise ConfigError(
            f"connector {model.config.connector.get('type')!r} has no vocabulary to prune; only 'align' has"
        )
    return model.connector


@torch.no_grad()
def transfer_rows(source: AlignConnector, target: AlignConnector, head_weight: Tensor) -> int:
    """Copy a connector into one that keeps other rows.

    A row that both keep, with its gain and bias, goes to its place; a row that the source lacks starts from the LM
    head, with the target's `gain_init` and no bias, as in a new connector. Everything before W2 is copied.

    Row-sharded weights (FSDP, DTensor) are not handled here: transfer on whole models, before they are wrapped or
    after their weights have been gathered, as a saved folder has them.

    Args:
        source: Trained.
        target: Same widths and vocabulary; overwritten.
        head_weight: (V, D) of the LLM's head.

    Returns:
        How many of the target's rows came from the source.

    Raises:
        ConfigError: If the two are of LLMs with different vocabularies.
    """
    if source.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the connector's weights are of a vocabulary of {source.vocab_size}, the model has {target.vocab_size}; "
            "rows can be kept and restored within one LLM only"
        )
    target.initialize(head_weight)
    target.w1.load_state_dict(source.w1.state_dict())
    target.norm1.load_state_dict(source.norm1.state_dict())
    places = {row: place for place, row in enumerate(source.row_ids())}
    pairs = [(places[row], place) for place, row in enumerate(target.row_ids()) if row in places]
    if not pairs:
        return 0
    origin, goal = torch.tensor(pairs, device=source.w2.weight.device).T
    for mine, theirs in (
        (target.w2.weight, source.w2.weight),
        (target.norm2.weight, source.norm2.weight),
        (target.norm2.bias, source.norm2.bias),
    ):
        mine[goal.to(mine.device)] = theirs[origin].to(mine)
    return len(pairs)


def prune(model: AlignVLMForConditionalGeneration, kept: Iterable[int]) -> None:
    """Keep only these rows of the vocabulary, in place; saved with the model, in its config and weights.

    Raises:
        ConfigError: If ids are wrong, or the connector is not ALIGN.
    """
    ids = check_kept(list(kept), require_align(model).vocab_size, where="prune")
    _rebuild(model, {"vocab_keep": list(ids)})


def unprune(model: AlignVLMForConditionalGeneration) -> None:
    """Give a pruned model its whole vocabulary again, in place: its rows as trained, the others from the LM head.

    Raises:
        ConfigError: If the connector is not ALIGN.
    """
    _rebuild(model, {})


def _rebuild(model: AlignVLMForConditionalGeneration, rows: dict[str, list[int]]) -> None:
    from .connectors import build_connector

    old = require_align(model)
    options = {
        key: value for key, value in model.config.connector.items() if key not in ("vocab_rows", "vocab_keep")
    } | rows
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
