"""The PP-OCR recogniser trunk as a Hugging Face vision encoder: a small convolutional network pretrained on text lines.

The layers are those of PP-OCRv6_rec_small (PaddleOCR, Apache-2.0) up to its last pooling, with batch norms folded into
the convolutions as in the published graph. An image (3, H, W) gives a map (384, H/16, W/4), and each group of
`cell_group` cells is one patch, by default 32x8 px with 384*2*2 = 1536 features. Text should be about 24 px high.
Squeeze-excite pools over the tile, so a patch depends weakly on all of its tile.
"""

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from alignvlm_pl.errors import ConfigError, DataError

MODEL_TYPE = "pp_ocr_vision"
STEM_STRIDE = 4  # two stride-2 convolutions, in both directions

# (channels out, row stride, squeeze-excite) of PP-OCRv6_rec_small, read by alignvlm_pl/pretrained/pp_ocr.py.
PP_OCRV6_SMALL_BLOCKS = (
    (96, 1, True),
    (96, 1, False),
    (96, 1, False),
    (192, 2, False),
    (192, 1, True),
    (192, 1, False),
    (192, 1, True),
    (192, 1, False),
    (192, 1, True),
    (192, 1, False),
    (384, 2, False),
    (384, 1, True),
    (384, 1, False),
)


class PPOCRVisionConfig(PreTrainedConfig):
    """Architecture of the trunk; the defaults are PP-OCRv6_rec_small.

    Args:
        stem_channels: Channels of the first convolutions; the stem's output has twice as many.
        blocks: One `[channels_out, row_stride, squeeze_excite]` per block.
        cell_group: Rows and columns of feature cells per patch.
        hidden_size: Features per patch; derived from the other fields, any other value raises.
    """

    model_type = MODEL_TYPE

    stem_channels: int = 48
    blocks: list[list[int | bool]] | tuple[tuple[int, int, bool], ...] = field(
        default_factory=lambda: [list(block) for block in PP_OCRV6_SMALL_BLOCKS]
    )
    cell_group: list[int] | tuple[int, int] = (2, 2)
    num_channels: int = 3
    hidden_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.blocks = [list(block) for block in self.blocks]
        group_rows, group_columns = self.cell_group
        self.cell_group = (group_rows, group_columns)
        derived = int(self.blocks[-1][0]) * group_rows * group_columns
        if self.hidden_size not in (None, derived):
            raise ConfigError(
                f"pp_ocr_vision: hidden_size={self.hidden_size}, but the last block and cell_group="
                f"{self.cell_group} give {derived}; leave hidden_size out"
            )
        self.hidden_size = derived
        super().__post_init__(**kwargs)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of one patch in pixels."""
        row_stride = math.prod(int(stride) for _, stride, _ in self.blocks)
        return STEM_STRIDE * row_stride * self.cell_group[0], STEM_STRIDE * self.cell_group[1]

    def tokens_for(self, height: int, width: int) -> int:
        """Return the number of patches of a tile in pixels; raise a `ConfigError` if its sides do not divide so."""
        patch_height, patch_width = self.patch_size
        if height < 1 or width < 1 or height % patch_height or width % patch_width:
            raise ConfigError(
                f"tile of {height}x{width} px (height x width) does not divide into patches of "
                f"{patch_height}x{patch_width} px; choose multiples of {patch_height} and {patch_width}"
            )
        return (height // patch_height) * (width // patch_width)


class Stem(nn.Module):
    """Stem at stride 4, with parallel convolution and pooling branches."""

    def __init__(self, in_channels: int, *, channels: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.branch_in = nn.Conv2d(channels, channels // 2, 2)
        self.branch_out = nn.Conv2d(channels // 2, channels, 2)
        self.merge = nn.Conv2d(2 * channels, channels, 3, stride=2, padding=1)
        self.exit = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 2 * channels, H/4, W/4)."""
        # 2x2 windows at stride 1 with one row and column of zeros below and on the right (SAME_UPPER in the published
        # graph). The zeros do not change the maximum: after ReLU no value is negative.
        pad = (0, 1, 0, 1)
        entry = functional.pad(functional.relu(self.entry(pixels)), pad)
        pooled = functional.max_pool2d(entry, 2, stride=1)
        branch = functional.pad(functional.relu(self.branch_in(entry)), pad)
        branch = functional.relu(self.branch_out(branch))
        merged = functional.relu(self.merge(torch.cat((pooled, branch), dim=1)))
        return functional.relu(self.exit(merged))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channels' means over the tile."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, h, w) to the same shape."""
        squeezed = functional.relu(self.reduce(features.mean((2, 3), keepdim=True)))
        return features * functional.hardsigmoid(self.expand(squeezed))


class Block(nn.Module):
    """Depthwise 3x3 -> [squeeze-excite] -> y; y + 1x1 expand -> GELU -> 1x1 project; no sum if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, row_stride: int, squeeze_excite: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride=(row_stride, 1), padding=1, groups=in_channels)
        self.squeeze_excite = SqueezeExcite(in_channels) if squeeze_excite else nn.Identity()
        self.expand = nn.Conv2d(in_channels, 2 * in_channels, 1)
        self.project = nn.Conv2d(2 * in_channels, out_channels, 1)
        self.residual = row_stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C_in, h, w) to (N, C_out, h / row_stride, w)."""
        mixed = self.squeeze_excite(self.depthwise(features))
        projected = self.project(functional.gelu(self.expand(mixed)))
        return mixed + projected if self.residual else projected


class PPOCRVisionModel(PreTrainedModel):
    """The trunk; its output is the sequence of patches in row-major order."""

    config_class = PPOCRVisionConfig
    base_model_prefix = "pp_ocr"
    main_input_name = "pixel_values"
    # It has no attention; declared so that an implementation chosen for the full model is accepted.
    _supports_sdpa = True
    _supports_flash_attn = True
    input_modalities = ("image",)
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: PPOCRVisionConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config.num_channels, channels=config.stem_channels)
        self.blocks = nn.ModuleList()
        channels = 2 * config.stem_channels
        for out_channels, stride, squeeze_excite in config.blocks:
            self.blocks.append(Block(channels, out_channels, row_stride=stride, squeeze_excite=bool(squeeze_excite)))
            channels = out_channels
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise such that convolutions keep the variance: there are no norms."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the feature map (N, C, H/16, W/4) of RGB tiles (N, 3, H, W) in [-1, 1]."""
        # The published weights expect BGR. Channels-last activations are 1.3 times as fast on CPU; the layout of the
        # weights makes no difference.
        pixels = pixel_values.flip(1).contiguous(memory_format=torch.channels_last)
        features = self.stem(pixels)
        for block in self.blocks:
            features = block(features)
        return features

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None) -> BaseModelOutput:
        """Encode RGB tiles (N, 3, H, W) in [-1, 1]; the output is a `BaseModelOutput`, whatever `return_dict` says.

        Returns:
            `last_hidden_state` (N, H/32 * W/8, hidden_size); within a patch, cells are row-major with all channels of a
            cell together.

        Raises:
            DataError: The input is not (N, 3, H, W).
            ConfigError: H or W is not a multiple of the patch's side.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise DataError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(tiles, {self.config.num_channels}, height, width)"
            )
        self.config.tokens_for(*pixel_values.shape[2:])
        return BaseModelOutput(last_hidden_state=self._group_cells(self.features(pixel_values)))

    def _group_cells(self, features: Tensor) -> Tensor:
        """Concatenate groups of cells: (N, C, h, w) to (N, h*w / group, C * group)."""
        group_rows, group_columns = self.config.cell_group
        cells = features.permute(0, 2, 3, 1).unflatten(2, (-1, group_columns)).unflatten(1, (-1, group_rows))
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)


AutoConfig.register(MODEL_TYPE, PPOCRVisionConfig, exist_ok=True)
AutoModel.register(PPOCRVisionConfig, PPOCRVisionModel, exist_ok=True)
