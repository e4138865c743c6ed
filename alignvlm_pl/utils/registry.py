"""Registries that fill themselves: what the files of a package define."""

import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any


def defined_in(package: str, path: Iterable[str]) -> Iterator[tuple[ModuleType, Any]]:
    """Import every module of a package and yield it with each value of its namespace.

    Args:
        package: `__name__` of the package.
        path: Its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        code = import_module(f"{package}.{module.name}")
        for value in list(vars(code).values()):
            yield code, value
