"""Configs as they come: of earlier versions, and files that are absent, empty or have a key twice.

The command line reads YAML through `load`, a saved `config.yaml` included: modules that moved are found at their new
place, names that are gone are answered. `check_files` looks at the files among its arguments before.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from yaml import YAMLError

from ..errors import ConfigError, nearest
from ..utils.installation import configs_dir
from ..utils.yaml_files import refuse_repeated_keys

MODULES = {
    "alignvlm_pl.parallel": "alignvlm_pl.strategies.fsdp",
    "alignvlm_pl.module": "alignvlm_pl.training.module",
    "datamodules.captions": "datamodules.cc12m",
    "datamodules.documents": "datamodules.bigdocs",
    "datamodules.instructions": "datamodules.docdownstream",
}
"""Old module of classes that a `class_path` may name -> the new one."""

REMOVED = {
    f"alignvlm_pl.{module}.ZeroStrategy": "configs/cluster/fsdp.yaml shards the model with FSDP2"
    for module in ("zero", "strategies.zero")
} | {
    "callbacks.resumed_epoch.ResumedEpoch": "leave it out, fit resumes inside an epoch",
    "callbacks.frozen_weights.FrozenWeights": "leave it out, frozen weights are not in the optimizer",
}
"""Class that is gone -> what to use instead."""

OPTIONS = {
    "max_cache_bytes": "delete old files of the cache folder (data.init_args.cache) instead",
    "allow_pipe": "mount or download the dataset and give its folder or URL instead of pipe:",
}
"""Setting of the DataModules that is gone -> what to do instead; an older saved config holds its default."""

FILES = {
    f"{old}.yaml": f"configs/stage/{new}.yaml, with the override of configs/recipe/{recipe}.yaml"
    for recipe, names in {
        "llama3.2-1b": {"1-1b": 1, "2-1b": 2, "3-1b": 3},
        "llama3.2-3b": {"1-3b": 1, "2-3b": 2, "3-3b": 3},
        "llama3.1-8b": {"1-8b": 1, "2-8b": 2, "3-8b": 3},
        "vcr-3b": {"3-3b-vcr": 3},
        "low-data-3b": {"low-data-1": 1, "low-data-2": 2},
    }.items()
    for old, new in names.items()
} | {f"{name}.yaml": "configs/cluster/fsdp.yaml" for name in ("zero2", "zero3")}
"""Name of a shipped file that is gone -> what to use instead."""


FOLDERS = {
    "config": "recipe",
    "model": "model",
    "connector": "model/connector",
    "data": "data",
    "stage": "stage",
    "trainer": "cluster",
    "benchmark": "benchmark",
}
"""Option that takes a YAML file -> folder of the files that are shipped for it."""
_OF_FILES = ("connector", "stage", "trainer", "benchmark")
"""Those of them that take no name of a class."""
_WORD = re.compile(r"[\w./~][\w./~-]*")


def answer_file(message: str) -> str:
    """Add to a message about a file that is not there what has become of it."""
    words = {word.strip("'\"").rpartition("/")[2] for word in message.split()}
    answers = [f"{name} is now {FILES[name]}" for name in sorted(words & FILES.keys())]
    return "; ".join([message, *answers])


def check_files(arguments: Sequence[str]) -> None:
    """Raise a ConfigError for a YAML file among the arguments that is not there, is empty or has a key twice.

    The parser reads files without their names, and takes the name of one that is not there for a value.
    """
    for before, argument in pairwise(["", *arguments]):
        name, _, value = argument.rpartition("=")
        path, option = Path(value), (name or before).lstrip("-")
        is_word = option in _OF_FILES and _WORD.fullmatch(value) and value != "null"
        if path.suffix not in (".yaml", ".yml") and not is_word:
            continue
        if not path.is_file():
            if option in FOLDERS:
                raise ConfigError(_absent(option, path))
            continue
        with suppress(YAMLError, UnicodeDecodeError):  # which the parser reports
            text = path.read_text("utf-8")
            refuse_repeated_keys(text, source=f"{path}: ")
            if option in FOLDERS and yaml.safe_load(text) is None:
                raise ConfigError(f"{path} is empty: expected settings")


def _absent(option: str, path: Path) -> str:
    message = f"--{option}: there is no file {path}"
    if path.name in FILES:
        return answer_file(message)
    folder = path.parent if path.parent != Path() and any(path.parent.glob("*.yaml")) else None
    folder = folder or configs_dir() / FOLDERS[option]
    return f"{message}; {nearest(path.name, [found.name for found in folder.glob('*.yaml')])} (in {folder})"


def load(stream: str) -> Any:
    """Read YAML as jsonargparse does, and rename what is in it; a key given twice is a ConfigError."""
    refuse_repeated_keys(stream)
    return renamed(get_loader("yaml")(stream))


def renamed(value: Any) -> Any:
    """Return a part of a configuration with classes by their new names; what is gone and set is a ConfigError."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if isinstance(value, str):  # also `--trainer.callbacks+=CLASS`
        return _new_path(value)
    if not isinstance(value, dict):
        return value
    for name, instead in OPTIONS.items():
        if value.get(name):
            raise ConfigError(f"{name} was removed: {instead}")
    return {key: renamed(item) for key, item in value.items() if key not in OPTIONS}


def _new_path(text: str) -> str:
    if text in REMOVED:
        raise ConfigError(f"{text} was removed; {REMOVED[text]}")
    module, _, name = text.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else text
