"""`export`: the Hugging Face folder of a run's last checkpoint, or of any of its checkpoints."""

import argparse
import logging
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..utils.yaml_files import load_yaml

CONFIG = "config.yaml"
log = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Write the folder that `fit` writes as `hf/` at the end of a stage."""
    parser = argparse.ArgumentParser(
        prog="alignvlm export",
        description="Write a checkpoint as a Hugging Face folder: weights (with stage.ema_decay their average, "
        "adapters merged), processor, and stage.json.",
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder of fit, or a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--config",
        type=Path,
        help="config.yaml of the run; default: the one in the run folder of the checkpoint",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: %(default)s)")
    options = parser.parse_args(argv[1:])
    checkpoint, config = _find(options.source, options.config)
    if options.out.exists():
        raise ConfigError(f"{options.out} exists: name a folder that does not, or remove it")

    from ..training.export import check_size, export_checkpoint
    from ..training.module import AlignVLMModule
    from .lightning_cli import build_parts

    check_size("--max-shard-size", options.max_shard_size)
    values = load_yaml(config)
    if "model" not in values:
        raise ConfigError(f"{config} has no `model`: expected the config.yaml of a run of fit")
    module = build_parts(values, source=config.name, model=AlignVLMModule).model
    record = export_checkpoint(
        checkpoint,
        options.out,
        spec=module.spec,
        processor=module.processor,
        weights=module.weights,
        max_shard_size=options.max_shard_size,
    )
    log.info("stage %s: %d steps, weights in %s", record["stage"], record["steps"], options.out)
    return 0


def _find(source: Path, config: Path | None) -> tuple[Path, Path]:
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such run folder or checkpoint")
    if source.is_dir() and ((source / CONFIG).is_file() or (source / "checkpoints").is_dir()):
        checkpoint, folder = source / "checkpoints" / "last.ckpt", source
        if not checkpoint.exists():
            raise CheckpointError(f"{checkpoint} is missing: the run has saved no checkpoint yet")
    else:
        checkpoint, folder = source, source.resolve().parent.parent
    config = config or folder / CONFIG
    if not config.is_file():
        raise ConfigError(f"{config}: there is no such file; name the config.yaml of the run with --config")
    return checkpoint, config
