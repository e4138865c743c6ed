"""Where the project's own files are: in a wheel, in an editable install and in a checkout."""

from pathlib import Path

from ..errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Return the folder of the shipped configurations (`base.yaml`, `model/`, `data/`, ...).

    A wheel carries it inside the package (setup.cfg maps `configs` to `alignvlm_pl.configs`); a checkout and an
    editable install have it beside the package.

    Raises:
        ConfigError: The folder is in neither place.
    """
    places = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for place in places:
        if (place / "base.yaml").is_file():
            return place
    raise ConfigError(
        f"no folder with base.yaml at {' or '.join(map(str, places))}; the installation is damaged: "
        "install alignvlm_pl again"
    )
