"""The installation: the folder of shipped configurations, and whether the top-level packages are this project's."""

from importlib import import_module
from importlib.metadata import packages_distributions, version
from pathlib import Path

from ..errors import ConfigError

DISTRIBUTION = "alignvlm_pl"
TOP_LEVEL_PACKAGES = ("callbacks", "datamodules")
_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Return the folder of the shipped configurations: inside the package of a wheel, beside that of a checkout.

    Raises a ConfigError where there is none.
    """
    folders = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for folder in folders:
        if (folder / "base.yaml").is_file():
            return folder
    raise ConfigError(
        f"no folder with base.yaml at {' or '.join(map(str, folders))}; the installation is damaged: "
        "install alignvlm_pl again"
    )


def check_top_level_packages() -> None:
    """Import `callbacks` and `datamodules`: names that others use too, and pip installs one over another silently.

    One that is missing or of another distribution is an ImportError, with the distributions that install it.
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
        if getattr(module, "__distribution__", None) != DISTRIBUTION:
            file = getattr(module, "__file__", None)
            place = file or ", ".join(getattr(module, "__path__", ["an unknown place"]))  # folders without __init__.py
            raise ImportError(
                f"package '{name}' comes from {place}, not from {DISTRIBUTION} ({_owners(name)}); "
                f"uninstall or move the other one, then reinstall {DISTRIBUTION}",
                name=name,
                path=file,
            )


def _owners(name: str) -> str:
    owners = sorted(set(packages_distributions().get(name, [])))
    listing = ", ".join(f"{owner} {version(owner)}" for owner in owners)
    return f"distributions that install it: {listing or 'none'}"
