"""Classes and objects by name: what the files of a package define, and what an import path names."""

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from ..errors import ConfigError, require_known

T = TypeVar("T")


def import_path(path: str, *, setting: str) -> Any:
    """Import what a dotted path names, such as `torch.optim.SGD`; a ConfigError names the setting."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}: {path!r} cannot be imported: {error}") from error


def defined_in(package: str, path: Iterable[str]) -> Iterator[tuple[ModuleType, Any]]:
    """Import every module of the package at `path`; yield it with each value of its namespace."""
    for module in pkgutil.iter_modules(path):
        code = import_module(f"{package}.{module.name}")
        for value in list(vars(code).values()):
            yield code, value


def instances_in(package: str, path: Iterable[str], kind: type[T]) -> dict[str, T]:
    """Return the values of a type that the modules of a package define, by their `name`, sorted."""
    found: list[Any] = [value for _, value in defined_in(package, path) if isinstance(value, kind)]
    return {value.name: value for value in sorted(found, key=lambda value: value.name)}


def load_instance(name: str, known: Mapping[str, T], kind: type[T]) -> T:
    """Return the value of a type that is registered under a name, or that an import path names, or a ConfigError."""
    setting = kind.__name__.lower()
    if "." in name:
        found = import_path(name, setting=setting)
        if not isinstance(found, kind):
            raise ConfigError(f"{setting}: {name!r} is no {kind.__name__} but a {type(found).__name__}")
        return found
    require_known(name, known, f"there is no {setting} {name!r}")
    return known[name]
