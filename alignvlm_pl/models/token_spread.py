"""Health of a connector's output: entropy of P_vocab, similarity of the tokens, and the gain for a target entropy.

At a gain of 1 every output is nearly the mean of all text embeddings, and training starts slowly. Measured on a subset
of a batch's visual tokens, in chunks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .pixels import as_tiles, at_least_one_tile

CHUNK_TOKENS = 64
"""Visual tokens per chunk: 33 MB of float32 scores at a vocabulary of 128,256."""
FACTORS = (2.0**-10, 2.0**14)
"""Search range of `gain_factor`."""
TOLERANCE = 1e-3  # nats


class TokenSpread(NamedTuple):
    """Sums over visual tokens, which can be summed over ranks: of the entropy of P_vocab in nats and of the largest
    weights (0 for connectors without P_vocab); `cosine` is `paired`, the tokens if at least two, times the mean cosine
    similarity of two different tokens' outputs.
    """

    tokens: float
    entropy: float
    max_weight: float
    paired: float
    cosine: float

    def metrics(self, *, reads_text: bool) -> dict[str, float]:
        """Return name -> mean; metrics without data are left out."""
        found = {}
        if reads_text and self.tokens:
            found = {"entropy": self.entropy / self.tokens, "max_weight": self.max_weight / self.tokens}
            found["effective_vocabulary"] = math.exp(found["entropy"])
        return {**found, **({"token_cosine": self.cosine / self.paired} if self.paired else {})}


@torch.no_grad()
def visual_features(net: Any, pixel_values: Tensor, tile_boxes: Tensor | None = None, *, limit: int) -> Tensor:
    """Return vision features (tiles, tokens, d) of evenly spaced tiles with at least `limit` tokens together.

    `net` is the model, `pixel_values` are (tiles, 3, H, W) and `tile_boxes` (tiles, 4), see `pixels.as_tiles`. A batch
    without tiles runs one tile of zeros and returns none: sharded ranks must all run the tower.
    """
    count = math.ceil(limit / net.config.tokens_per_tile)
    boxes = None if tile_boxes is None else _evenly_spaced(tile_boxes, count)
    tiles = as_tiles(_evenly_spaced(pixel_values, count), boxes)
    found: Tensor = net.encode_images(at_least_one_tile(tiles))
    return found[: len(tiles)]


@torch.no_grad()
def vocabulary_scores(connector: Any, features: Tensor, *, limit: int) -> Tensor:
    """Return the scores before the softmax (n, rows), float32, of at most `limit` evenly spaced visual tokens.

    `connector` is an `AlignConnector`, `features` are (tiles, tokens, d) vision features.
    """
    norm = connector.norm2
    found = []
    for part in _evenly_spaced(features.flatten(0, 1), limit).split(CHUNK_TOKENS):
        raw = connector.w2(connector.norm1(connector.w1(part))).float()
        found.append(F.layer_norm(raw, raw.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps))
    return torch.cat(found)


@torch.no_grad()
def token_spread(connector: Any, features: Tensor, table: Tensor, *, limit: int) -> TokenSpread:
    """Measure at most `limit` evenly spaced visual tokens of any connector.

    `features` (tiles, tokens, d) are vision features, and `table` (V, D) the text embeddings.
    """
    if not len(features):
        # FSDP2 prefetches in the order of the last forward; ranks with different orders would hang.
        connector(at_least_one_tile(features), table)
        return TokenSpread(0, 0, 0, 0, 0)
    entropy = largest = 0.0
    if connector.reads_text:  # ALIGN treats tokens independently, so only the chosen ones run
        chunks = _evenly_spaced(features.flatten(0, 1), limit).split(CHUNK_TOKENS)
        for part in chunks:
            log_weights = vocabulary_scores(connector, part[None], limit=CHUNK_TOKENS).log_softmax(dim=-1)
            entropy += _entropy(log_weights)
            largest += float(log_weights.amax(dim=-1).exp().sum())
        outputs = torch.cat([connector(part[None], table).embeds[0] for part in chunks])
    else:
        outputs = _evenly_spaced(connector(features, table).embeds.flatten(0, 1), limit)
    paired = len(outputs) if len(outputs) > 1 else 0
    return TokenSpread(len(outputs), entropy, largest, paired, paired * mean_cosine(outputs) if paired else 0.0)


def mean_cosine(outputs: Tensor) -> float:
    """Return the mean cosine similarity of two different rows of (n, D), n at least 2, without n x n cosines."""
    units = F.normalize(outputs.float(), dim=-1)
    # The squared norm of the sum counts every pair twice, and each row with itself.
    self_products = units.square().sum()
    return float((units.sum(dim=0).square().sum() - self_products) / (len(units) * (len(units) - 1)))


@torch.no_grad()
def gain_factor(scores: Tensor, bias: Tensor, *, target: float) -> tuple[float, float]:
    """Find the factor on the vocabulary norm's gain for which P_vocab has a given mean entropy in nats, by bisection.

    `scores` (n, rows) are those of the current gain, `bias` (rows,) is the norm's. Returned are the factor, and the
    mean entropy that it gives: within `TOLERANCE` of the target.

    Raises:
        ConfigError: If no factor within `FACTORS` reaches the target; the message has the reachable range.
    """
    bias = bias.float()
    low, high = FACTORS

    def entropy(factor: float) -> float:
        return mean_entropy(scores, lambda part: (part - bias) * factor + bias)

    most, least = entropy(low), entropy(high)
    if not least <= target <= most:
        raise ConfigError(
            f"stage.calibrate.target_entropy={target:g}: the vocabulary norm reaches {least:.3f} to {most:.3f} nats on "
            f"this batch ({scores.shape[1]} rows, gain x {low:g} to {high:g}); choose a target between them"
        )
    for _ in range(60):
        factor = math.sqrt(low * high)
        found = entropy(factor)
        if abs(found - target) <= TOLERANCE:
            break
        low, high = (factor, high) if found > target else (low, factor)
    return factor, found


def mean_entropy(scores: Tensor, change: Callable[[Tensor], Tensor] = lambda part: part) -> float:
    """Return the mean entropy in nats of softmax(change(scores)), scores (n, rows)."""
    parts = (change(part).log_softmax(dim=-1) for part in scores.split(CHUNK_TOKENS))
    return sum(_entropy(part) for part in parts) / len(scores)


def _entropy(log_weights: Tensor) -> float:
    # entr(0) is 0; log_weights of -inf would be 0 · inf.
    return float(torch.special.entr(log_weights.exp()).sum(dim=-1).sum())


def _evenly_spaced(items: Tensor, count: int) -> Tensor:
    """Return at most `count` items, evenly spaced."""
    places = torch.linspace(0, len(items) - 1, count, device=items.device).round().long()
    return items if len(items) <= count else items[places]
