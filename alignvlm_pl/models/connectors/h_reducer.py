"""H-Reducer of mPLUG-DocOwl 1.5 (arXiv 2403.12895): convolutions merge horizontally adjacent tokens.

The original 1 x 4 windows divide 32 columns evenly. SigLIP's tiles have 27: a stride of 4 would drop the last three
columns, the right edge of the page, so the grid is padded with zeros to 28, which gives 27 x 7 = 189 tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import pair
from .base import Connector
from .grid import TokenGrid, check_grid, expand_to_tiles, to_feature_map, to_tokens


class HReducerConnector(Connector):
    """Horizontal reducer.

    Args:
        window: Rows and columns of tokens that are merged into one.
        end_token: Append a learned token to each tile, as DocOwl does to each image.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        grid: TokenGrid,
        window: tuple[int, int] = (1, 4),
        end_token: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.window = grid, pair("window", window)
        joined = self.window[0] * self.window[1]
        self.before = nn.Conv2d(vision_dim, joined * vision_dim, self.window, stride=self.window)
        self.reducer = nn.Conv2d(vision_dim, vision_dim, self.window, stride=self.window)
        self.projection = nn.Linear(vision_dim, text_dim)
        self.end = nn.Parameter(torch.randn(1, text_dim)) if end_token else None

    def tokens_per_tile(self, tokens: int) -> int:
        check_grid(tokens, self.grid)
        rows, columns = (-(-size // side) for size, side in zip(self.grid, self.window, strict=True))
        return rows * columns + (self.end is not None)

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, rows · columns, d) to (tiles, windows, D)."""
        feature_map = to_feature_map(features, self.grid)
        below, right = (-size % side for size, side in zip(self.grid, self.window, strict=True))
        feature_map = F.pad(feature_map, (0, right, 0, below))
        tokens: Tensor = self.projection(to_tokens(self.reducer(self._mix(feature_map))))
        return tokens if self.end is None else torch.cat([tokens, expand_to_tiles(tokens, self.end)], dim=1)

    def _mix(self, feature_map: Tensor) -> Tensor:
        """Mix the tokens of each window; the feature map (tiles, d, rows, columns) keeps its shape."""
        mixed = F.gelu(self.before(feature_map))  # (tiles, window · d, rows / height, columns / width)
        height, width = self.window
        parts = mixed.unflatten(1, (height, width, -1))  # (tiles, height, width, d, rows, columns)
        return parts.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
