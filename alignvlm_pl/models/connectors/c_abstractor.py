"""C-Abstractor of HoneyBee (arXiv 2312.06742): convolutions, pooling to fewer cells, convolutions.

HoneyBee's learned positions were for 24 x 24 tokens; here there are as many as the tile's grid has. Pooling 27 cells to
12 takes windows of unequal size, which adaptive pooling does.
"""

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..options import pair, require_at_least
from .base import Connector
from .grid import Grid, check_grid, to_picture, to_tokens
from .regstage import RegStage

_POSITION_STD = 0.02
_POOL = 12


class CAbstractorConnector(Connector):
    """Convolutional abstractor.

    Args:
        vision_dim: Width d of the vision features.
        text_dim: Width D of the LLM.
        vocab_size: Unused: part of the connector interface.
        grid: Rows and columns of the tokens of a tile.
        hidden: Channels of the convolutions.
        depth: Blocks before and behind the pooling, each.
        pool: Rows and columns of cells that are left, the tokens of a tile; null: HoneyBee's 12 x 12, or where the
            grid has fewer rows or columns, as many as it has.
        mlp_depth: Linear layers of the readout to the LLM's width, with SiLU between them.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        grid: Grid,
        hidden: int = 1024,
        depth: int = 3,
        pool: tuple[int, int] | None = None,
        mlp_depth: int = 2,
    ) -> None:
        super().__init__()
        require_at_least(1, hidden=hidden, depth=depth, mlp_depth=mlp_depth)
        self.grid, self.cells = grid, _cells(pool, grid)
        self.position = nn.Parameter(torch.empty(grid[0] * grid[1], vision_dim))
        nn.init.trunc_normal_(self.position, std=_POSITION_STD)
        self.before = RegStage(depth, vision_dim, hidden)
        self.pool = nn.AdaptiveAvgPool2d(self.cells)
        self.behind = RegStage(depth, hidden, hidden)
        modules: list[nn.Module] = [nn.Linear(hidden, text_dim)]
        for _ in range(1, mlp_depth):
            modules += [nn.SiLU(), nn.Linear(text_dim, text_dim)]
        self.readout = nn.Sequential(*modules)

    def tokens_per_tile(self, tokens: int) -> int:
        """The cells that are left."""
        check_grid(tokens, self.grid)
        return self.cells[0] * self.cells[1]

    def project(self, features: Tensor) -> Tensor:
        """Abstract features (tiles, rows · columns, d)."""
        check_grid(features.shape[1], self.grid)
        picture = to_picture(features + self.position.to(features.dtype), self.grid)
        tokens: Tensor = self.readout(to_tokens(self.behind(self.pool(self.before(picture)))))
        return tokens


def _cells(pool: tuple[int, int] | None, grid: Grid) -> Grid:
    if pool is None:
        return min(_POOL, grid[0]), min(_POOL, grid[1])
    rows, columns = pair("pool", pool)
    if rows > grid[0] or columns > grid[1]:
        raise ConfigError(
            f"connector pool={rows} x {columns} is larger than a tile's grid of {grid[0]} x {grid[1]} tokens; pooling "
            "cannot add tokens: set a smaller pool, or null"
        )
    return rows, columns
