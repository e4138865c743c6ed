"""Vision tower: any Hugging Face vision model without the modules whose output is not used.

Unused modules would have parameters without gradients, which DDP rejects: the pooling head is removed always, the final
norm for `last`, and the last layer as well for `penultimate`.
"""

import copy
from itertools import product
from pathlib import Path

from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from ..errors import ConfigError
from ..preprocessing.tiling import Tiling
from .loading import copy_weights, load_pretrained, require_complete

_FINAL_NORMS = ("post_layernorm", "layernorm", "layer_norm")


def build_vision_tower(config: PretrainedConfig, feature: str = "last_normed") -> PreTrainedModel:
    """Build the vision model of `config` without the modules that `feature`, one of `FEATURES`, does not use.

    Raises:
        ConfigError: If the model has no final norm or no layer to remove.
    """
    config = copy.deepcopy(config)
    for unused in ("vision_use_head", "use_mask_token"):
        if hasattr(config, unused):
            setattr(config, unused, False)
    if feature == "penultimate":
        if getattr(config, "num_hidden_layers", 0) < 1:
            raise ConfigError(
                f"vision_feature 'penultimate' needs a model with num_hidden_layers, {config.model_type} has none; "
                "use vision_feature: last_normed"
            )
        config.num_hidden_layers -= 1
    model: PreTrainedModel = AutoModel.from_config(config)
    # Some versions of transformers nest SigLIP and CLIP one level deeper.
    levels = [module for module in (model, getattr(model, "vision_model", None)) if isinstance(module, nn.Module)]
    for module in levels:
        for name in ("head", "pooler"):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, None)
        if hasattr(module, "use_head"):  # SigLIP in versions whose config does not have the switch
            module.use_head = False  # type: ignore[assignment]
    # CLIP applies its final norm to the pooled vector only, not to `last_hidden_state`.
    if feature == "last_normed" and config.model_type != "clip_vision_model":
        return model
    for module, name in product(levels, _FINAL_NORMS):
        if isinstance(getattr(module, name, None), nn.Module):
            setattr(module, name, nn.Identity())
            return model
    raise ConfigError(
        f"{type(model).__name__} has no final norm among {', '.join(_FINAL_NORMS)}; use vision_feature: last_normed"
    )


def load_vision_weights(tower: PreTrainedModel, folder: str | Path) -> None:
    """Copy pretrained weights into a tower, without those of removed modules; raise a `CheckpointError` if there are
    none, or a tensor of the tower is missing or has another shape.
    """
    source, missing = load_pretrained(AutoModel, folder, what="vision")
    if hasattr(source, "vision_model") and not hasattr(tower, "vision_model"):
        source = source.vision_model
        missing = {name.removeprefix("vision_model.") for name in missing}
    state, expected = source.state_dict(), tower.state_dict()
    require_complete({key for key in expected if key not in state or key in missing}, what="vision", source=folder)
    copy_weights(tower, {key: state[key] for key in expected}, what="vision", source=folder)


def token_grid(config: PretrainedConfig, tiling: Tiling) -> tuple[int, int]:
    """Return the rows and columns of tokens in one tile, from the patch size of the vision model's configuration."""
    return patch_grid(config, tiling.tile_height, tiling.tile_width)


def patch_size(config: PretrainedConfig) -> tuple[int, int]:
    """Return the height and width of a patch in pixels, from the vision model's configuration."""
    patch = config.patch_size
    height, width = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return height, width


def patch_grid(config: PretrainedConfig, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tokens in a tile of this height and width in pixels."""
    patch_height, patch_width = patch_size(config)
    return height // patch_height, width // patch_width
