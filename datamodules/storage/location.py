"""Location of a dataset, a folder or a URL, and how its files become local paths (no torch here).

Shards and manifests are untrusted: a manifest may only name files of its own dataset; servers come from the config.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit, urlunsplit

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.pretrained.cache import cache_dir

from .fetching import SCHEMES, Expected, MissingFileError, Policy, fetch, fetch_small, redact, require_package

# At least two letters, unlike a drive of Windows; a Path has lost one of the two slashes of a URL.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
# Allowed names of files of remote datasets: they become parts of URLs and paths.
_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f\\:]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How remote datasets are fetched; plain values, which can be pickled into worker processes.

    `cache` is the folder of the local copies; None: `shards` in `cache_dir()`, which is `$ALIGNVLM_CACHE`.
    """

    cache: Path | None = None
    policy: Policy = field(default_factory=Policy)

    def locate(self, folder: Path | str) -> Path | str:
        """Return a path or a checked URL; ConfigError: an unknown scheme, a malformed URL, a missing package."""
        text = str(folder)
        match = _SCHEME.fullmatch(text)
        if match is None or (match[1].lower() not in SCHEMES and Path(text).exists()):
            return Path(folder)
        scheme, slashes, rest = match.groups()
        if scheme.lower() not in SCHEMES or not slashes:
            raise ConfigError(
                f"{redact(text)!r}: expected a folder or a URL with {', '.join(f'{s}://' for s in SCHEMES)}, found "
                f"{scheme}:; give the plain path of a local folder, where other sources are mounted or downloaded first"
            )
        return _checked_url(f"{scheme.lower()}://{slashes[2:]}{rest}")

    def local_path(self, folder: Path | str, name: str, expected: Expected) -> Path:
        """Return the local path of a file of a dataset, fetched if that is remote; a local one is not checked."""
        if isinstance(folder, Path):
            return folder / name
        cache, url = self.cache or cache_dir() / "shards", file_url(folder, name)
        return fetch(url, cache=cache, expected=expected, name=PurePosixPath(name).name, policy=self.policy)

    def read_small(self, folder: Path | str, name: str, *, max_bytes: int) -> bytes:
        """Return the content of a small file, read from its source each time; errors as in `fetch_small`."""
        if not isinstance(folder, Path):
            return fetch_small(file_url(folder, name), max_bytes=max_bytes, policy=self.policy)
        path = folder / name
        try:
            with path.open("rb") as stream:
                content = stream.read(max_bytes + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError(f"{path}: there is no such file; check the path") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        if len(content) > max_bytes:
            raise DataError(f"{path}: expected at most {max_bytes} bytes, found more; it is not a file of a dataset")
        return content


def file_url(folder: str, name: str) -> str:
    """Return the URL of a file of a remote dataset."""
    parts = urlsplit(folder)
    quoted = quote(name) if parts.scheme in ("http", "https") else name
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quoted}"))


def check_file_name(name: object, *, where: str) -> str:
    """Return a file name of a manifest; DataError: a path that leaves its folder, a URL, or unsafe characters."""
    parts = {part.strip(" ") for part in name.split("/")} if isinstance(name, str) else {""}
    if isinstance(name, str) and len(name) <= 1024 and _FILE_NAME.fullmatch(name) and not parts & {"", ".", ".."}:
        return name
    raise DataError(
        f"{where}: expected the name of a file in the folder of the dataset, found {name!r:.200}; "
        "do not use this dataset: write it again, or tell its publisher"
    )


def format_location(folder: Path | str) -> str:
    """Return a dataset's location for errors."""
    return str(folder) if isinstance(folder, Path) else redact(folder)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    wanted = {"http": "a host", "https": "a host", "hf": "hf://datasets/ORGANISATION/NAME/FOLDER"}
    good = bool(parts.netloc) and not _CONTROL.search(url) and not parts.fragment
    if parts.scheme == "hf":
        good = good and parts.netloc == "datasets" and "/" in parts.path.strip("/")
    if not good:
        form = wanted.get(parts.scheme, "a bucket")
        raise ConfigError(f"{redact(url)!r}: expected {form} and no blank or #, found another form; check the URL")
    require_package(parts.scheme)
    return url.rstrip("/") if not parts.query else url
