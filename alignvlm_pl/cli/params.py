"""`params`: what each stage of a recipe trains, from configs alone (no weights, no memory)."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .recipe import load_yaml, read_stages

if TYPE_CHECKING:
    from ..models.build import ModelSpec


def run(argv: list[str]) -> int:
    """Print one table for each stage of a recipe."""
    parser = argparse.ArgumentParser(prog="alignvlm params", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="a recipe with `model` and `stages`")
    parser.add_argument(
        "--connector", type=Path, help="a file of configs/model/connector in place of the model's connector"
    )
    options = parser.parse_args(argv[1:])
    for name, path in (("--config", options.config), ("--connector", options.connector)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{name} {path}: there is no such file")
    sys.stdout.write("\n\n".join(tables(options.config, connector=options.connector)) + "\n")
    return 0


def tables(recipe: Path, *, connector: Path | None = None) -> list[str]:
    """Return the table of every stage of a recipe, built on the meta device.

    `connector` is the file of a connector in place of the recipe's, or else the model's.

    Raises:
        ConfigError: The recipe has no stages, or names no file of a model.
    """
    from copy import deepcopy

    import torch

    from ..models.build import build_config
    from ..models.modeling import AlignVLMForConditionalGeneration
    from ..training.lora import attach_adapters
    from ..training.optim import freeze
    from ..training.part_table import part_table
    from ..training.stage import Stage
    from .lightning_cli import build_parts

    stages = read_stages(recipe)
    if not stages:
        raise ConfigError(f"{recipe} lists no stages; see configs/recipe/ for examples")
    spec = read_spec(_file_of(recipe, "model", "configs/model"))
    if connector is None and load_yaml(recipe).get("connector") is not None:
        connector = _file_of(recipe, "connector", "configs/model/connector")
    if connector is not None:
        spec = replace(spec, connector=load_yaml(connector))
    # Any id will do: the placeholder's is only compared with input ids.
    config = build_config(spec, image_token_id=0)
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config)
    found = []
    for entry in stages:
        source = entry.files["stage"].name
        stage: Stage = build_parts({"stage": entry.stage_settings()}, source=source, stage=Stage).stage
        staged = deepcopy(model)  # adapters stay in what they were put into
        freeze(staged, stage)
        attach_adapters(staged, stage.adapters)
        tokens = f"one tile is {config.tokens_per_tile} visual tokens"
        found.append(f"{part_table(staged, stage)}\n{tokens}")
    return found


def _file_of(recipe: Path, axis: str, folder: str) -> Path:
    name = load_yaml(recipe).get(axis)
    if not isinstance(name, str) or not (recipe.parent / name).is_file():
        raise ConfigError(f"{recipe}: expected `{axis}:` to be the path of a file in {folder}, found {name!r}")
    return (recipe.parent / name).resolve()


def read_spec(path: Path) -> "ModelSpec":
    """Read the model of a file in `configs/model/`, without its weights.

    Raises:
        ConfigError: There is no such file, or it describes no model.
    """
    from ..models.build import ModelSpec
    from .lightning_cli import build_parts

    if not path.is_file():
        raise ConfigError(f"--model {path}: there is no such file; see configs/model/")
    spec: ModelSpec = build_parts({"spec": load_yaml(path).get("spec")}, source=path.name, spec=ModelSpec).spec
    return spec
