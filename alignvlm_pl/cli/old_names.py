"""Configs of earlier versions: modules that moved are found at their new place, names that are gone are answered.

The command line reads YAML through `load`, a saved `config.yaml` included.
"""

from typing import Any

from jsonargparse import get_loader

from ..errors import ConfigError

MODULES = {
    "alignvlm_pl.parallel": "alignvlm_pl.strategies.fsdp",
    "alignvlm_pl.module": "alignvlm_pl.training.module",
    "datamodules.captions": "datamodules.cc12m",
    "datamodules.documents": "datamodules.bigdocs",
    "datamodules.instructions": "datamodules.docdownstream",
}
"""Old module of classes that a `class_path` may name -> the new one."""

REMOVED = {"alignvlm_pl.zero.ZeroStrategy": "configs/cluster/fsdp.yaml shards the model with FSDP2"}
"""Class that is gone -> what to use instead."""


def load(stream: str) -> Any:
    """Read YAML as jsonargparse does; each `class_path` by its new name.

    Raises:
        ConfigError: It names a class that is gone.
    """
    return _renamed(get_loader("yaml")(stream))


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: new_path(item) if key == "class_path" and isinstance(item, str) else _renamed(item)
        for key, item in value.items()
    }


def new_path(class_path: str) -> str:
    """Where a class is today.

    Raises:
        ConfigError: It is gone.
    """
    module, _, name = class_path.rpartition(".")
    if class_path in REMOVED:
        raise ConfigError(f"{class_path} was removed; {REMOVED[class_path]}")
    return f"{MODULES[module]}.{name}" if module in MODULES else class_path
