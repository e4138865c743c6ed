"""Are the top-level packages `callbacks` and `datamodules` really ours?

Their names are common: another distribution may install a package of the same name over ours, which pip does
without a word. The command line asks here before it imports anything from them.
"""

from importlib import import_module
from importlib.metadata import packages_distributions, version
from types import ModuleType

DISTRIBUTION = "alignvlm_pl"
TOP_LEVEL_PACKAGES = ("callbacks", "datamodules")


def check_top_level_packages() -> None:
    """Import `callbacks` and `datamodules` and make sure that this distribution ships them.

    Raises:
        ImportError: One of them is missing or foreign; the message names its file and the distributions that
            install a package of that name.
    """
    for name in TOP_LEVEL_PACKAGES:
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f"package '{name}' of {DISTRIBUTION} is not installed ({_owners(name)}); reinstall {DISTRIBUTION}",
                name=name,
            ) from error
        # CONTRACT: callbacks/__init__.py and datamodules/__init__.py both set __distribution__.
        if getattr(module, "__distribution__", None) != DISTRIBUTION:
            raise ImportError(
                f"package '{name}' comes from {_place(module)}, not from {DISTRIBUTION} ({_owners(name)}); "
                f"uninstall or move the other one, then reinstall {DISTRIBUTION}",
                name=name,
                path=getattr(module, "__file__", None),
            )


def _place(module: ModuleType) -> str:
    """Return the file of a package, or its folders where it has no `__init__.py`."""
    return getattr(module, "__file__", None) or ", ".join(getattr(module, "__path__", ["an unknown place"]))


def _owners(name: str) -> str:
    """Describe which installed distributions ship a top-level package of this name."""
    owners = sorted(set(packages_distributions().get(name, [])))
    listing = ", ".join(f"{owner} {version(owner)}" for owner in owners)
    return f"distributions that install it: {listing or 'none'}"
