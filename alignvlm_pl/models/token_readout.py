"""What P_vocab reads at each place of an image: the most probable token, its probability, and the entropy.

The scores are computed a chunk of visual tokens at a time; none of (tokens, V) is ever held whole.
"""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..preprocessing.imaging import cut_pixels
from ..preprocessing.tiling import Box, Tiling, plan_tiles, token_boxes
from .align import AlignConnector
from .connectors import shuffle_factor
from .connectors.grid import shuffled_grid
from .pixels import as_tiles, at_least_one_tile
from .token_spread import CHUNK_TOKENS, vocabulary_scores
from .vision import patch_size, token_grid


class TokenReadout(NamedTuple):
    """Of the visual tokens of tiles, all (tiles, tokens): id of the most probable token, its probability, and the
    entropy of P_vocab in nats; with `connector.collapse` which are blank, and which the LLM runs on, else None.
    """

    ids: Tensor
    probabilities: Tensor
    entropy: Tensor
    blank: Tensor | None
    kept: Tensor | None


class PlacedToken(NamedTuple):
    """A visual token of an image: its box in pixels of the image, empty where it shows padding, and what is read."""

    box: Box
    text: str
    probability: float
    entropy: float
    kept: bool
    blank: bool
    in_thumbnail: bool


def has_places(net: Any) -> bool:
    """Whether a model's connector is ALIGN, and its visual tokens form a grid."""
    if not isinstance(net.connector, AlignConnector) or getattr(net.config.vision_config, "patch_size", None) is None:
        return False
    rows, columns = net.grid
    return bool(rows * columns == net.config.tokens_per_tile)


@torch.no_grad()
def read_tokens(
    net: Any, pixel_values: Tensor, tile_boxes: Tensor | None = None, thumbnails: Tensor | None = None
) -> TokenReadout:
    """Read out all visual tokens of tiles (tiles, 3, H, W), of which uint8 ones need `tile_boxes`, see `as_tiles`.

    `net` is the model; `thumbnails` (tiles,) bool are the tiles of which `connector.collapse` keeps all. Without tiles
    one of zeros runs, as sharded ranks must all run the same modules, and nothing is returned.

    Raises:
        ConfigError: The connector has no P_vocab.
    """
    connector = net.connector
    if not isinstance(connector, AlignConnector):
        raise ConfigError(f"connector {net.config.connector['type']!r} has no P_vocab to read out; use 'align'")
    features = net.encode_images(at_least_one_tile(as_tiles(pixel_values, tile_boxes)))
    blank = kept = None
    if (collapse := net.collapse) is not None:
        log_probs = connector.log_probs(features, collapse.tokens)[: len(pixel_values)]
        blank, kept = collapse.blank(log_probs), collapse.kept(log_probs, net.grid, thumbnails)
    rows = torch.tensor(connector.row_ids(), device=features.device)
    parts = [_read_chunk(connector, part, rows) for part in features.flatten(0, 1).split(CHUNK_TOKENS)]
    values = (
        torch.cat(part).unflatten(0, features.shape[:2])[: len(pixel_values)] for part in zip(*parts, strict=True)
    )
    ids, probabilities, entropy = values
    return TokenReadout(ids, probabilities, entropy, blank, kept)


def _read_chunk(connector: Any, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, probabilities and entropies (n,) of vision features (n, d)."""
    weights = vocabulary_scores(connector, features[None], limit=len(features)).softmax(dim=-1)
    largest, index = weights.max(dim=-1)
    return rows[index], largest, torch.special.entr(weights).sum(dim=-1)


def place_tokens(
    readout: TokenReadout, config: Any, tokenizer: Any, *, size: tuple[int, int], tiling: Tiling
) -> list[PlacedToken]:
    """Return the visual tokens of one image of `size` (width, height) in pixels, in the order of the sequence.

    `readout` is that of the image's tiles, `config` the model's. Without `connector.collapse` tokens are blank whose
    text is whitespace, and all are kept.
    """
    factor = shuffle_factor(config.connector)
    rows, columns = shuffled_grid(token_grid(config.vision_config, tiling), factor)
    height, width = patch_size(config.vision_config)
    boxes = token_boxes(*size, tiling, grid=(rows, columns), token_size=(height * factor, width * factor))
    ids = readout.ids.flatten().tolist()
    texts = {token: tokenizer.decode([token]) for token in set(ids)}
    blank = [not texts[token].strip() for token in ids] if readout.blank is None else readout.blank.flatten().tolist()
    kept = [True] * len(ids) if readout.kept is None else readout.kept.flatten().tolist()
    thumbnail = [tile.is_thumbnail for tile in plan_tiles(*size, tiling) for _ in range(rows * columns)]
    values = (readout.probabilities.flatten().tolist(), readout.entropy.flatten().tolist(), kept, blank, thumbnail)
    return [
        PlacedToken(box, texts[token], *others)
        for box, token, *others in zip([box for tile in boxes for box in tile], ids, *values, strict=True)
    ]


def read_page(net: Any, processor: Any, image: Image.Image) -> list[PlacedToken]:
    """Return what is read on an image, whose tiles are cut as `processor` cuts them; see `read_tokens`."""
    tiling = processor.geometry
    pixels, boxes = (torch.from_numpy(array).to(net.device) for array in cut_pixels(image, tiling))
    thumbnails = torch.tensor([tile.is_thumbnail for tile in plan_tiles(*image.size, tiling)], device=net.device)
    readout = read_tokens(net, pixels, boxes, thumbnails)
    return place_tokens(readout, net.config, processor.tokenizer, size=image.size, tiling=tiling)
