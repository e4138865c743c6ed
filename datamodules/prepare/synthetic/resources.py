"""Words, real tables and typefaces inside installed packages, found without importing what the packages import."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from alignvlm_pl.errors import ConfigError


@cache
def package_folder(package: str) -> Path:
    """Return the folder of an installed package; raises ConfigError with the pip command where it is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ConfigError(
            f"the document generator needs the package {distribution}, which is not installed; "
            f"run: pip install {distribution} (or: pip install 'alignvlm_pl[synthetic]')"
        )
    return Path(spec.submodule_search_locations[0])


def package_files(package: str, pattern: str) -> list[Path]:
    """Return the files of a package that match a glob pattern, by name; raises ConfigError where there is none."""
    folder = package_folder(package)
    files = sorted(folder.glob(pattern))
    if not files:
        raise ConfigError(f"package {package} in {folder} has no file {pattern}; install it again")
    return files
