"""Lenses: which text token a connector's output is nearest to, for connectors with and without P_vocab.

The embedding lens takes the text embedding with the largest cosine, the logit lens the most probable token of the LM
head, as if the output were a last hidden state (LatentLens, arXiv 2602.00462, compares both).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .pixels import as_tiles, at_least_one_tile
from .token_readout import TokenReadout

LENSES = ("embedding", "logit")
Lens = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Outputs (n, D) -> ids, certainty and spread (n,)."""
_CHUNK_TOKENS = 64


def has_grid(net: Any) -> bool:
    """Whether each token of a tile is at a place of its own: the outputs form the grid of the vision tokens."""
    if getattr(net.config.vision_config, "patch_size", None) is None:
        return False
    rows, columns = net.grid
    return getattr(net.connector, "keeps_places", True) and rows * columns == net.config.tokens_per_tile


@torch.no_grad()
def connector_outputs(net: Any, pixel_values: Tensor, tile_boxes: Tensor | None = None) -> Tensor:
    """Return the connector's outputs (tiles, tokens, D) for pixel values (tiles, 3, H, W), see `pixels.as_tiles`."""
    features = net.encode_images(at_least_one_tile(as_tiles(pixel_values, tile_boxes)))
    found: Tensor = net.connector(features, net.get_input_embeddings().weight).embeds
    return found[: len(pixel_values)]


@torch.no_grad()
def read_lens(net: Any, outputs: Tensor, lens: str) -> TokenReadout:
    """Return the text tokens that a connector's outputs (tiles, tokens, D) are nearest to under one of `LENSES`.

    Returns:
        Ids; of the embedding lens the cosine and 1 less the cosine, of the logit lens the probability and the entropy
        of the head's distribution in nats; all (tiles, tokens).
    """
    scored = _cosines(net) if lens == "embedding" else _probabilities(net)
    parts = [scored(part) for part in outputs.flatten(0, 1).split(_CHUNK_TOKENS)]
    values = (torch.cat(part).unflatten(0, outputs.shape[:2]) for part in zip(*parts, strict=True))
    ids, certain, spread = values
    return TokenReadout(ids, certain, spread, None, None)


def _cosines(net: Any) -> Lens:
    table = F.normalize(net.get_input_embeddings().weight.float(), dim=-1)

    def read(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosine, ids = (F.normalize(outputs.float(), dim=-1) @ table.T).max(dim=-1)
        return ids, cosine, 1 - cosine

    return read


def _probabilities(net: Any) -> Lens:
    norm, head = getattr(net.language_model.get_decoder(), "norm", None), net.get_output_embeddings()

    def read(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = head(outputs if norm is None else norm(outputs)).float().softmax(dim=-1)
        largest, ids = weights.max(dim=-1)
        return ids, largest, torch.special.entr(weights).sum(dim=-1)

    return read
