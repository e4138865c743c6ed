"""C-Abstractor of HoneyBee (arXiv 2312.06742): convolutions, adaptive pooling to a smaller grid, convolutions.

HoneyBee has 24 x 24 learned positions; here there is one per cell of the tile's grid. The convolutions are timm's
`RegStage(act_layer=SiLU, norm_layer=LayerNorm2d)`, written anew with its names and shapes, so that weights are
exchanged with `load_state_dict`: timm needs torchvision, which does not load beside a CPU build of torch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ..options import pair, require_at_least
from .base import Connector
from .grid import TokenGrid, check_grid, to_feature_map, to_tokens

_POOL = 12
_SQUEEZE = 0.25
"""Inner channels of squeeze-and-excitation as a share of the block's input channels."""


class CAbstractorConnector(Connector):
    """Convolutional abstractor.

    Args:
        hidden: Channels of the convolutions.
        depth: Number of blocks before, and of blocks after the pooling.
        pool: Rows and columns after pooling, which are the tokens of a tile; null: HoneyBee's 12 x 12, or the grid's
            rows or columns where it has fewer.
        mlp_depth: Linear layers of the output projection, with SiLU between them.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        grid: TokenGrid,
        hidden: int = 1024,
        depth: int = 3,
        pool: tuple[int, int] | None = None,
        mlp_depth: int = 2,
    ) -> None:
        super().__init__()
        require_at_least(1, hidden=hidden, depth=depth, mlp_depth=mlp_depth)
        self.grid, self.cells = grid, _cells(pool, grid)
        self.position = nn.Parameter(torch.empty(grid[0] * grid[1], vision_dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.before = RegStage(depth, vision_dim, hidden)
        self.pool = nn.AdaptiveAvgPool2d(self.cells)
        self.behind = RegStage(depth, hidden, hidden)
        modules: list[nn.Module] = [nn.Linear(hidden, text_dim)]
        for _ in range(1, mlp_depth):
            modules += [nn.SiLU(), nn.Linear(text_dim, text_dim)]
        self.readout = nn.Sequential(*modules)

    def tokens_per_tile(self, tokens: int) -> int:
        check_grid(tokens, self.grid)
        return self.cells[0] * self.cells[1]

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, rows · columns, d) to (tiles, pooled cells, D)."""
        check_grid(features.shape[1], self.grid)  # before the positions are added
        feature_map = to_feature_map(features + self.position.to(features.dtype), self.grid)
        tokens: Tensor = self.readout(to_tokens(self.behind(self.pool(self.before(feature_map)))))
        return tokens


def _cells(pool: tuple[int, int] | None, grid: TokenGrid) -> TokenGrid:
    if pool is None:
        return min(_POOL, grid[0]), min(_POOL, grid[1])
    rows, columns = pair("pool", pool)
    if rows > grid[0] or columns > grid[1]:
        raise ConfigError(
            f"connector pool={rows} x {columns} is larger than a tile's grid of {grid[0]} x {grid[1]} tokens; pooling "
            "cannot add tokens: set a smaller pool, or null"
        )
    return rows, columns


class RegStage(nn.Sequential):
    """RegNet stage: `depth` blocks at stride 1, `out_channels` wide."""

    def __init__(self, depth: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"b{index + 1}", RegBlock(out_channels if index else in_channels, out_channels))


class RegBlock(nn.Module):
    """Residual bottleneck: 1 x 1, depthwise 3 x 3, squeeze-and-excitation, 1 x 1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel=3, groups=out_channels)
        self.se = RegSqueezeExcite(out_channels, max(1, round(in_channels * _SQUEEZE)))
        self.conv3 = ConvNorm(out_channels, out_channels, activate=False)
        same = in_channels == out_channels
        self.downsample = nn.Identity() if same else ConvNorm(in_channels, out_channels, activate=False)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (tiles, in_channels, rows, columns) to (tiles, out_channels, rows, columns)."""
        inside = self.conv3(self.se(self.conv2(self.conv1(feature_map))))
        return F.silu(inside + self.downsample(feature_map))


class ConvNorm(nn.Module):
    """Convolution without bias, LayerNorm over the channels, and SiLU where `activate` is set."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(out_channels)  # timm's name for the norm of any kind
        self.activate = activate

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (tiles, in_channels, rows, columns) to (tiles, out_channels, rows, columns)."""
        normed = self.bn(self.conv(feature_map).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(normed) if self.activate else normed


class RegSqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (tiles, channels, rows, columns) to the same shape."""
        mean = feature_map.mean((2, 3), keepdim=True)
        return feature_map * self.fc2(F.silu(self.fc1(mean))).sigmoid()
