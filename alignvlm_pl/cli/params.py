"""`params`: what each stage of a recipe trains, from configs alone (no weights, no memory)."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .recipe import read_stages


def run(argv: list[str]) -> int:
    """Print one table for each stage of a recipe."""
    parser = argparse.ArgumentParser(prog="alignvlm params", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="a recipe with `model` and `stages`")
    recipe: Path = parser.parse_args(argv[1:]).config
    if not recipe.is_file():
        raise ConfigError(f"--config {recipe}: there is no such file")
    sys.stdout.write("\n\n".join(tables(recipe)) + "\n")
    return 0


def tables(recipe: Path) -> list[str]:
    """The table of every stage of a recipe, built on the meta device.

    Raises:
        ConfigError: If the recipe has no stages, or its model names no configuration.
    """
    import torch

    from ..models.build import ModelSpec, build_config
    from ..models.modeling import AlignVLMForConditionalGeneration
    from ..optim import freeze
    from ..part_table import part_table
    from ..stages import Stage

    stages = read_stages(recipe)
    if not stages:
        raise ConfigError(f"{recipe} lists no stages; see configs/recipe/ for examples")
    spec: ModelSpec = load_part(ModelSpec, _model_file(recipe), key="spec")
    # Any id will do: the placeholder's is only compared with input ids.
    config = build_config(spec, image_token_id=0)
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config)
    found = []
    for entry in stages:
        stage: Stage = load_part(Stage, entry["stage"])
        freeze(model, stage)
        found.append(part_table(model, stage))
    return found


def _model_file(recipe: Path) -> Path:
    import yaml

    content = yaml.safe_load(recipe.read_text())
    if not isinstance(content.get("model"), str):
        raise ConfigError(
            f"{recipe}: expected `model:` to be the path of a file in configs/model, found {content.get('model')!r}"
        )
    return (recipe.parent / content["model"]).resolve()


def load_part(kind: type, path: Path, *, key: str | None = None) -> Any:
    """Parse one YAML file as a dataclass, with the checks of the full command line."""
    import yaml

    from .lightning_cli import AlignParser

    parser = AlignParser(prog=path.name)
    parser.add_class_arguments(kind, "value")
    content = yaml.safe_load(path.read_text())
    parsed = parser.parse_object({"value": content[key] if key else content})
    return parser.instantiate_classes(parsed).value
