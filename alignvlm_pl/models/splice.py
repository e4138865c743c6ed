"""Put visual vectors at the placeholder positions of the token embeddings, or refuse with both counts."""

import torch
from torch import Tensor

from ..errors import DataError


def splice(embeds: Tensor, mask: Tensor, visual: Tensor, num_tiles: Tensor | None = None) -> Tensor:
    """Replace embeddings at placeholder positions (paper, equation 3).

    Args:
        embeds: (B, L, D) token embeddings.
        mask: (B, L) bool, true at placeholders, in reading order of the tiles.
        visual: (tiles, tokens, D) visual vectors of the whole batch.
        num_tiles: (B,) tiles of each sample, or None to check the totals only.

    Raises:
        DataError: If placeholders and visual vectors differ in number, naming both (and the sample).
    """
    tiles, tokens, width = visual.shape
    if num_tiles is not None:
        if len(num_tiles) != len(mask):
            raise DataError(f"num_tiles has {len(num_tiles)} entries but the batch has {len(mask)} samples")
        found = mask.sum(dim=1)
        wrong = torch.nonzero(found != num_tiles * tokens).flatten().tolist()
        if wrong:
            row = wrong[0]
            raise DataError(
                f"sample {row} of the batch has {int(found[row])} image placeholders but its {int(num_tiles[row])} "
                f"tiles give {int(num_tiles[row]) * tokens} visual tokens ({tokens} a tile); processor and model "
                "disagree on tiling or tokens_per_tile"
            )
    if int(mask.sum()) != tiles * tokens:
        raise DataError(
            f"the batch has {int(mask.sum())} image placeholders but {tiles} tiles give {tiles * tokens} visual tokens "
            f"({tokens} a tile); processor and model disagree on tiling or tokens_per_tile"
        )
    return embeds.masked_scatter(mask.unsqueeze(-1), visual.reshape(-1, width).to(embeds.dtype))
