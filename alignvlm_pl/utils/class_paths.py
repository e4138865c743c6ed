"""Classes and objects that a setting names by their import path."""

from importlib import import_module
from typing import Any

from ..errors import ConfigError


def import_path(path: str, *, setting: str) -> Any:
    """Import what a dotted path names, such as `torch.optim.SGD`.

    Raises:
        ConfigError: There is no such module, or no such name in it; with the name of the setting.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}: {path!r} cannot be imported: {error}") from error
