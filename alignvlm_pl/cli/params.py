"""`params`: what each stage of a recipe trains, and the memory of a step on its GPUs, from configs alone."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..utils.yaml_files import load_yaml
from .recipe import read_stages

if TYPE_CHECKING:
    from ..models.build import ModelSpec
    from ..training.memory import Spread
    from ..training.stage import Stage


def run(argv: list[str]) -> int:
    """Print one table for each stage of a recipe."""
    parser = argparse.ArgumentParser(prog="alignvlm params", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="a recipe with `model` and `stages`")
    parser.add_argument(
        "--connector", type=Path, help="a file of configs/model/connector in place of the model's connector"
    )
    options = parser.parse_args(argv[1:])
    sys.stdout.write("\n\n".join(tables(options.config, connector=options.connector)) + "\n")
    return 0


def tables(recipe: Path, *, connector: Path | None = None) -> list[str]:
    """Return the table of every stage of a recipe, with the connector of a file in place of the recipe's or model's.

    Raises a ConfigError where the recipe has no stages.
    """
    from ..models.build import build_config
    from ..training.flops import meta_model
    from ..training.part_table import part_table
    from ..training.stage import Stage
    from .lightning_cli import build_parts

    stages = read_stages(recipe, option="--config ")
    if not stages:
        raise ConfigError(f"{recipe} lists no stages; see configs/recipe/ for examples")
    spec = read_spec(_file_of(recipe, "model", "configs/model"))
    named = {axis for axis, value in load_yaml(recipe).items() if value is not None}
    if connector is None and "connector" in named:
        connector = _file_of(recipe, "connector", "configs/model/connector")
    files = {axis: _file_of(recipe, axis, f"configs/{axis}") for axis in ("model", "data", "trainer") if axis in named}
    if connector is not None:
        spec = replace(spec, connector=load_yaml(connector, option="--connector "))
    # Any id will do: the placeholder's is only compared with input ids.
    config = build_config(spec, image_token_id=0)
    found = []
    for entry in stages:
        source = entry.files["stage"].name
        stage = build_parts({"stage": entry.settings("stage")}, source=source, stage=Stage).stage
        model = meta_model(config, stage)
        tokens = f"one tile is {config.tokens_per_tile} visual tokens"
        settings = {axis: entry.settings(axis, files.get(axis)) for axis in ("model", "data", "trainer")}
        memory = _memory(model, stage, settings)
        found.append("\n".join(filter(None, [part_table(model, stage), tokens, memory])))
    return found


def _memory(model: Any, stage: "Stage", settings: dict[str, dict[str, Any]]) -> str:
    """Return the memory of a step on a GPU of 80 GB as text; empty for a recipe without GPUs."""
    from ..training.memory import CHOICES, largest_micro_batch, step_memory, uncounted
    from .lightning_cli import count_devices

    trainer = settings["trainer"]
    if trainer.get("accelerator") != "gpu":
        return ""
    data = settings["data"].get("init_args", settings["data"])
    devices, nodes = count_devices({"num_nodes": 1, **trainer}), trainer.get("num_nodes", 1)
    batch = largest_micro_batch(
        model.config,
        batch_size=data.get("batch_size", 8),
        max_text_length=data.get("max_text_length") or stage.max_text_length,
        token_budget=data.get("token_budget"),
    )
    try:
        memory = step_memory(model, stage, batch, _spread(trainer, devices, nodes))
    except Exception as error:  # of a custom part
        return f"\n{uncounted(error)}; activation_checkpointing: auto takes {list(CHOICES[-1])}"
    given = settings["model"].get("activation_checkpointing", "auto")
    chosen = memory.choose() if given == "auto" else tuple(given or ())
    title = (
        f"memory of a GPU, one of {devices * nodes}, for the largest micro batch: "
        f"{batch.rows} x {batch.tokens:,} tokens, {batch.tiles} tiles"
    )
    if given == "auto":
        verdict = memory.explain(chosen)
    else:
        verdict = f"model.activation_checkpointing: {list(chosen)}; a step {memory.verdict(chosen)}"
    return "\n".join(["", title, memory.table(chosen), verdict])


def _spread(trainer: dict[str, Any], devices: int, nodes: int) -> "Spread":
    from ..training.acceleration import CHECKPOINTED
    from ..training.memory import Spread

    strategy = trainer.get("strategy", "auto")
    options = strategy.get("init_args", {}) if isinstance(strategy, dict) else {}
    name = str(strategy.get("class_path") if isinstance(strategy, dict) else strategy)
    mixed = trainer.get("precision") == "bf16-mixed"
    if name.endswith("ShardedStrategy"):
        return Spread(
            shards=devices if options.get("shard_within_node") else devices * nodes,
            whole_gradients=not options.get("sync_every_micro_batch", True),
            gathered=tuple(part for part in CHECKPOINTED if not options.get(f"reshard_{part}", True)),
            mixed=mixed,
        )
    return Spread(buckets=devices * nodes > 1, mixed=mixed)


def _file_of(recipe: Path, axis: str, folder: str) -> Path:
    name = load_yaml(recipe).get(axis)
    if not isinstance(name, str) or not (recipe.parent / name).is_file():
        raise ConfigError(f"{recipe}: expected `{axis}:` to be the path of a file in {folder}, found {name!r}")
    return (recipe.parent / name).resolve()


def read_spec(path: Path) -> "ModelSpec":
    """Read the model of a file in `configs/model/`, without its weights."""
    from ..models.build import ModelSpec
    from .lightning_cli import build_parts

    if not path.is_file():
        raise ConfigError(f"--model {path}: there is no such file; see configs/model/")
    values = {"spec": load_yaml(path, option="--model ").get("spec")}
    spec: ModelSpec = build_parts(values, source=path.name, spec=ModelSpec).spec
    return spec
