"""How far apart a connector's tokens are: sharpness of P_vocab, likeness of the outputs, and a gain that sets it.

At a gain of 1 the vocabulary norm leaves the weights close to uniform: each output is nearly the mean of all text
embeddings, and training starts slowly. All is measured on some of a batch's visual tokens, a chunk at a time.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .pixels import as_tiles

CHUNK_TOKENS = 64
"""Visual tokens whose scores exist at once: 33 MB in float32 at a vocabulary of 128,256."""
FACTORS = (2.0**-10, 2.0**14)
"""Range in which `gain_factor` looks."""
NEAR_ENOUGH = 1e-3  # nats
_MOST_HALVINGS = 60


class TokenSpread(NamedTuple):
    """Sums over visual tokens, so that those of several ranks add up.

    Args:
        tokens: Number of visual tokens.
        entropy: Sum of the entropy of P_vocab in nats; 0 for connectors without P_vocab.
        max_weight: Sum of each token's largest weight, likewise.
        paired: Number of tokens if there are at least two, else 0.
        cosine: `paired` times the mean cosine between the outputs of two different tokens.
    """

    tokens: float
    entropy: float
    max_weight: float
    paired: float
    cosine: float

    def metrics(self, *, reads_text: bool) -> dict[str, float]:
        """Name -> mean; no entry where there is nothing to take a mean of."""
        found = {}
        if reads_text and self.tokens:
            entropy = self.entropy / self.tokens
            found = {
                "entropy": entropy,
                "effective_vocabulary": math.exp(entropy),
                "max_weight": self.max_weight / self.tokens,
            }
        return {**found, **({"token_cosine": self.cosine / self.paired} if self.paired else {})}


@torch.no_grad()
def visual_features(
    net: Any, pixel_values: Tensor, tile_boxes: Tensor | None = None, *, limit: int
) -> Tensor:
    """Vision features (tiles, tokens, d) of evenly spaced tiles, as many as have `limit` tokens (rounded up).

    A batch without a tile runs one of zeros and gives none: sharded ranks must run the tower equally often.

    Args:
        net: An `AlignVLMForConditionalGeneration`.
        pixel_values: (tiles, 3, H, W).
        tile_boxes: (tiles, 4), needed where the tiles are uint8; see `pixels.as_tiles`.
        limit: Visual tokens that are wanted.
    """
    count = math.ceil(limit / net.config.tokens_per_tile)
    boxes = None if tile_boxes is None else _spread(tile_boxes, count)
    tiles = as_tiles(_spread(pixel_values, count), boxes)
    found: Tensor = net.encode_images(tiles if len(tiles) else _zeros(tiles))
    return found[: len(tiles)]


@torch.no_grad()
def vocabulary_scores(connector: Any, features: Tensor, *, limit: int) -> Tensor:
    """Scores before the softmax (n, rows), float32, of at most `limit` evenly spaced visual tokens.

    CONTRACT: models/align.py calls its parts `w1`, `norm1`, `w2` and `norm2`.

    Args:
        connector: One whose `reads_text` is true.
        features: (tiles, tokens, d).
        limit: Most visual tokens.
    """
    norm = connector.norm2
    found = []
    for part in _spread(features.flatten(0, 1), limit).split(CHUNK_TOKENS):
        raw = connector.w2(connector.norm1(connector.w1(part))).float()
        found.append(F.layer_norm(raw, raw.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps))
    return torch.cat(found)


@torch.no_grad()
def token_spread(connector: Any, features: Tensor, table: Tensor, *, limit: int) -> TokenSpread:
    """Measure at most `limit` evenly spaced visual tokens.

    Args:
        connector: Any connector.
        features: (tiles, tokens, d) vision features; there may be none, the connector runs all the same.
        table: (V, D) text embeddings.
        limit: Most visual tokens.
    """
    if not len(features):
        # FSDP2 remembers what ran last and gathers it ahead in the next backward: on all ranks the same, or they hang.
        connector(features.new_zeros((1, *features.shape[1:])), table)
        return TokenSpread(0, 0, 0, 0, 0)
    entropy = largest = 0.0
    if connector.reads_text:
        # Tokens do not see each other, so those that are left out need not run at all.
        chunks = _spread(features.flatten(0, 1), limit).split(CHUNK_TOKENS)
        for part in chunks:
            log_weights = vocabulary_scores(connector, part[None], limit=CHUNK_TOKENS).log_softmax(dim=-1)
            entropy += float(_entropy(log_weights).sum())
            largest += float(log_weights.amax(dim=-1).exp().sum())
        outputs = torch.cat([connector(part[None], table).embeds[0] for part in chunks])
    else:
        outputs = _spread(connector(features, table).embeds.flatten(0, 1), limit)
    count = len(outputs)
    paired = count if count > 1 else 0
    return TokenSpread(count, entropy, largest, paired, paired * mean_cosine(outputs) if paired else 0.0)


def mean_cosine(outputs: Tensor) -> float:
    """Mean cosine between two different rows of (n, D), n at least 2, without the n x n cosines."""
    units = F.normalize(outputs.float(), dim=-1)
    # The squared length of the sum has every pair twice, and each row with itself.
    own = units.square().sum()
    return float((units.sum(dim=0).square().sum() - own) / (len(units) * (len(units) - 1)))


@torch.no_grad()
def gain_factor(scores: Tensor, bias: Tensor, *, target: float) -> tuple[float, float]:
    """Find the factor on the vocabulary norm's gain with which P_vocab has a mean entropy.

    Args:
        scores: (n, rows) with the gain as it is.
        bias: (rows,) of the vocabulary norm.
        target: Mean entropy in nats.

    Returns:
        The factor, and the mean entropy with it: within `NEAR_ENOUGH` of the target.

    Raises:
        ConfigError: If no factor in `FACTORS` reaches the target; the message has the range that is reached.
    """
    bias = bias.float()
    low, high = FACTORS

    def entropy(factor: float) -> float:
        parts = scores.split(CHUNK_TOKENS)
        return sum(float(_entropy(_with_factor(part, bias, factor)).sum()) for part in parts) / len(scores)

    most, least = entropy(low), entropy(high)
    if not least <= target <= most:
        raise ConfigError(
            f"stage.calibrate.target_entropy={target:g}: the vocabulary norm reaches {least:.3f} to {most:.3f} nats on "
            f"this batch ({scores.shape[1]} rows, gain x {low:g} to {high:g}); choose a target between them"
        )
    for _ in range(_MOST_HALVINGS):
        factor = math.sqrt(low * high)
        found = entropy(factor)
        if abs(found - target) <= NEAR_ENOUGH:
            break
        low, high = (factor, high) if found > target else (low, factor)
    return factor, found


def mean_entropy(scores: Tensor) -> float:
    """Mean entropy in nats of the weights behind scores (n, rows)."""
    return sum(float(_entropy(p.log_softmax(dim=-1)).sum()) for p in scores.split(CHUNK_TOKENS)) / len(scores)


def _with_factor(scores: Tensor, bias: Tensor, factor: float) -> Tensor:
    return ((scores - bias) * factor + bias).log_softmax(dim=-1)


def _entropy(log_weights: Tensor) -> Tensor:
    # entr(0) is 0; log_weights of -inf would be 0 · inf.
    return torch.special.entr(log_weights.exp()).sum(dim=-1)


def _spread(items: Tensor, count: int) -> Tensor:
    """At most `count` items, evenly spaced."""
    if len(items) <= count:
        return items
    return items[torch.linspace(0, len(items) - 1, count, device=items.device).round().long()]


def _zeros(pixel_values: Tensor) -> Tensor:
    return pixel_values.new_zeros((1, *pixel_values.shape[1:]))
