"""RegNet stage with LayerNorm, as HoneyBee takes it from timm: `RegStage(act_layer=SiLU, norm_layer=LayerNorm2d)`.

timm itself cannot be imported without torchvision, whose packages fail to load beside a torch for the CPU alone. These
modules have the names and shapes of timm's, so that weights are exchanged with `load_state_dict`; a test compares.
"""

from torch import Tensor, nn
from torch.nn import functional as F

_SQUEEZE = 0.25
"""Inner channels of squeeze-and-excitation, as a share of the block's input channels."""


class RegStage(nn.Sequential):
    """Blocks of one width, at stride 1.

    Args:
        depth: Number of blocks.
        in_channels: Channels of the input, which only the first block sees.
        out_channels: Channels of everything behind.
    """

    def __init__(self, depth: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        for index in range(depth):
            block = RegBlock(in_channels if index == 0 else out_channels, out_channels)
            self.add_module(f"b{index + 1}", block)


class RegBlock(nn.Module):
    """Residual bottleneck: 1 x 1, depthwise 3 x 3, squeeze-and-excitation, 1 x 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels inside and of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel=3, groups=out_channels)
        self.se = SqueezeExcite(out_channels, max(1, round(in_channels * _SQUEEZE)))
        self.conv3 = ConvNorm(out_channels, out_channels, activate=False)
        same = in_channels == out_channels
        self.downsample = nn.Identity() if same else ConvNorm(in_channels, out_channels, activate=False)

    def forward(self, picture: Tensor) -> Tensor:
        """Picture (tiles, in_channels, rows, columns) to (tiles, out_channels, rows, columns)."""
        inside = self.conv3(self.se(self.conv2(self.conv1(picture))))
        return F.silu(inside + self.downsample(picture))


class ConvNorm(nn.Module):
    """Convolution without bias, LayerNorm over the channels, and SiLU where `activate` is set."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.LayerNorm(out_channels)  # timm's name for its norm, whatever the norm is
        self.activate = activate

    def forward(self, picture: Tensor) -> Tensor:
        """Picture (tiles, in_channels, rows, columns) to (tiles, out_channels, rows, columns)."""
        normed = self.bn(self.conv(picture).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(normed) if self.activate else normed


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that sees the mean of all channels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, picture: Tensor) -> Tensor:
        """Picture (tiles, channels, rows, columns), scaled."""
        mean = picture.mean((2, 3), keepdim=True)
        return picture * self.fc2(F.silu(self.fc1(mean))).sigmoid()
