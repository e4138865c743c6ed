"""Classes and objects that a setting names by their import path."""

from importlib import import_module
from typing import Any

from ..errors import ConfigError


def import_path(path: str, *, setting: str) -> Any:
    """Import what a dotted path names.

    Args:
        path: Module and name, such as `torch.optim.SGD`.
        setting: Name of the setting, for the message.

    Raises:
        ConfigError: There is no such module, or no such name in it.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}: {path!r} cannot be imported: {error}") from error
