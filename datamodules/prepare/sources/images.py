"""Images of rows: named files of a folder, or embedded bytes."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.images.metadata import is_image_head
from alignvlm_pl.preprocessing.images.source import describe_source
from alignvlm_pl.utils.text_files import HEAD_BYTES, content_kind

from ...shards.sample import SampleError
from ...shards.sample_formats import as_list, image_parts
from ...storage.file_kinds import IMAGE_ENDINGS, existing_file, is_companion
from .source import checked_image

logger = logging.getLogger(__name__)
EncodedImage = tuple[bytes, str]
"""Content and file ending, an element of `SourceSample.images`."""

_PATHS = ("path", "url", "image", "image_url")
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_PAGE_ENDINGS = ("svg", "pdf")
_TEXT_ENDINGS = ("txt", "json", "jsonl", "csv", "tsv", "xml", "html", "md")


def safe_path(name: str, *, where: str) -> PurePosixPath:
    """Return a relative path that stays below its folder, or raise SampleError for another (``unsafe_path``)."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute():
        raise SampleError(
            f"{where}: the image's path {name!r:.120} is absolute; expected one relative to the images", "unsafe_path"
        )
    # A colon in the first part may be a drive of Windows.
    _refuse_no_path(name, where)
    if not path.parts or ".." in path.parts or "\0" in name or path.parts[0][1:2] == ":":
        raise SampleError(f"{where}: the image's path {name!r:.120} is not one below its folder", "unsafe_path")
    return path


def _refuse_no_path(name: str, where: str) -> None:
    if not name.strip():
        raise SampleError(f"{where}: the path of an image is empty", "missing_image")
    if _ADDRESS.match(name):
        raise SampleError(
            f"{where}: image {describe_source(name)}: expected a path; store it as a file below --image-root",
            "missing_image",
        )


def image_names(record: Mapping[str, Any], *, where: str) -> list[str]:
    """Return the paths (or ``{path}``, ``{url}``) in ``image`` or ``images`` of a record, else in parts of its turns.

    Raises:
        SampleError: There is something else, or both fields differ (``bad_row``); a path is empty or an address
            (``missing_image``).
    """
    given = given_images(record, where=where)
    given = given or [part for part in image_parts(record.get("messages")) if _path_of(part)]
    named = [_path_of(one) for one in given]
    paths = [path for path in named if isinstance(path, str)]
    if len(paths) != len(named):
        name = "image" if record.get("image") else "images"
        raise SampleError(f"{where}: {name!r} must be a path or a list of paths, found {given!r:.120}", "bad_row")
    for path in paths:
        _refuse_no_path(path, where)
    return paths


def given_images(record: Mapping[str, Any], *, where: str) -> list[Any]:
    """Return what ``image`` or ``images`` of a record holds, or raise SampleError where both differ (``bad_row``)."""
    image, images = ([] if (held := record.get(name)) == "" else as_list(held) for name in ("image", "images"))
    if image and images and image != images:
        raise SampleError(f"{where}: 'image' and 'images' differ: {image!r:.80}, {images!r:.80}; keep one", "bad_row")
    return image or images or [""] * ("" in (record.get("image"), record.get("images")))


def _path_of(described: Any) -> Any:
    """Return the path in ``{path}``, ``{url}``, ``{image}`` or ``{image_url: {url}}``; another value as it is."""
    for _ in range(2):
        if isinstance(described, Mapping):
            described = next((described[name] for name in _PATHS if described.get(name)), None)
    return described


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Images below a folder; an index of them by name, if made already, is pickled with it."""

    root: Path
    index: "FolderIndex | None" = field(default=None, repr=False, compare=False)

    def read(self, name: str, *, where: str) -> EncodedImage:
        """Read the image at a path relative to the folder, or at an absolute one below it.

        Raises:
            SampleError: The path is unsafe, there is no such file (``missing_image``), or it does not decode.
        """
        below = self._relative(name, where=where)
        try:
            return _checked(existing_file(self.root, below) or self.root / below)
        except SampleError as error:
            advice = "; name its folder with --image-root" if error.reason == "missing_image" else ""
            raise SampleError(f"{where}: {error}{advice}", error.reason) from error

    def _relative(self, name: str, *, where: str) -> PurePosixPath:
        """Return the path of an image relative to the folder, or raise SampleError where it is not below it."""
        given = PurePosixPath(name.removeprefix("file://"))
        if not given.is_absolute():
            return safe_path(name, where=where)
        for root in (self.root.absolute(), self.root.resolve()):
            if given.is_relative_to(root):
                return safe_path(str(given.relative_to(root)), where=where)
        raise SampleError(
            f"{where}: the image's path {name!r:.120} is absolute; expected one below {self.root} (--image-root)",
            "unsafe_path",
        )

    def find(self, name: str, *, where: str) -> EncodedImage:
        """Read the image of a path, or of a file's name with or without ending, anywhere below the folder.

        Raises a SampleError for a name that no file has.
        """
        path = self._relative(name, where=where)
        if existing_file(self.root, path) is None:
            index = self.index or _index_once(self.root)
            if (found := index.find(str(path))) is None:
                raise SampleError(
                    f"{where}: no image {name!r:.120} among the {len(index.names)} names below {self.root}",
                    "missing_image",
                )
            name = found
        return self.read(name, where=where)


@lru_cache(maxsize=8)
def _checked(path: Path) -> EncodedImage:
    """Return an image that decodes to its end, in a format of shards."""
    # Cached, since consecutive rows often share a page.
    name = f"image {describe_source(path)}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError(f"{name}: {error.strerror}", "missing_image") from error
    return checked_image(data, name)


class FolderIndex:
    """Images of a folder by name; the first path in sorted order where several files have the name."""

    def __init__(self, root: Path) -> None:
        self.names: dict[str, str] = {}  # file name -> path relative to the folder
        self.stems: dict[str, str] = {}  # file name and path without their endings -> path
        duplicates = 0
        for path in image_paths(root):
            name = normalize("NFC", path.rpartition("/")[2])
            duplicates += name in self.names
            self.names.setdefault(name, path)
            for stem in (name, normalize("NFC", path)):
                self.stems.setdefault(stem.rpartition(".")[0], path)
        if duplicates:
            logger.warning("%s: %d images have the name of an earlier one and are not used", root, duplicates)

    def find(self, name: str) -> str | None:
        """Return the path of the image of a path in the folder or of a file's name, with or without ending."""
        name = normalize("NFC", name)
        last = name.rpartition("/")[2]
        found = self.stems.get(name) or self.names.get(last) or self.stems.get(last)
        if found is None:
            return None
        # `204-csv/8.png` has the file name of `203-csv/8` and is another image: folders that both have must be equal.
        folders = (reversed(path.split("/")[:-1]) for path in (name, found))
        return found if all(one == other for one, other in zip(*folders, strict=False)) else None


_index_once = lru_cache(maxsize=1)(FolderIndex)


def image_paths(root: Path) -> Iterator[str]:
    """Yield the paths of the images (`is_image_file`) below a folder, in a fixed order; ``._a.png`` is none.

    Raises:
        DataError: There is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder of images {root}")
    for folder, below, files in os.walk(root):
        below.sort()
        for file in sorted(files):
            path = Path(folder) / file
            name = path.relative_to(root).as_posix()
            if not is_companion(name) and is_image_file(path):
                yield name


def is_image_file(path: Path) -> bool:
    """Return whether a file is an image by its ending, or by its first bytes where its ending says nothing.

    Drawings and documents count: they are named as such where they are read.
    """
    ending = path.suffix.lower().lstrip(".")
    if ending in IMAGE_ENDINGS or ending in _PAGE_ENDINGS or ending in _TEXT_ENDINGS:
        return ending not in _TEXT_ENDINGS
    try:
        with path.open("rb") as stream:
            return is_image_head(stream.read(16))
    except OSError:
        return False


def embedded_image(value: Any, *, where: str, folder: ImageFolder | None = None) -> EncodedImage:
    """Return the image of a cell: bytes, or the hub's ``{bytes, path}``, whose path counts where it has no bytes.

    Raises:
        SampleError: The cell is empty (``missing_image``), or the image does not decode.
    """
    if isinstance(value, Mapping):
        path = value.get("path") if folder is not None else None
        value = path if value.get("bytes") is None and isinstance(path, str) else value.get("bytes")
    if isinstance(value, str) and folder is not None:
        return folder.find(value, where=where)
    if not isinstance(value, bytes):
        kind = content_kind(value[:HEAD_BYTES].encode("utf-8", "replace")) if isinstance(value, str) else ""
        found = f"{kind or repr(value)[:60]}" if value is not None else "nothing"
        raise SampleError(f"{where}: the cell holds no image: expected its bytes, found {found}", "missing_image")
    return checked_image(value, f"{where}: image")
