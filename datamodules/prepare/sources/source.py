"""The interface of raw data that can be packed (`RawData`, in parts), and the samples that it yields."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.images.metadata import MAX_KEPT_BYTES, essential_bytes
from alignvlm_pl.preprocessing.images.source import describe_source
from alignvlm_pl.preprocessing.imaging import has_more_pages, load_image, read_header

from ...shards.sample import SampleError

logger = logging.getLogger(__name__)
Converted = TypeVar("Converted")
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One converted row, before it is written to a shard: its JSON in the sample schema, and its images.

    Of each image there is content and file ending, in the order of their index. The content is bytes, or the path of a
    file that is read again when the sample is written.
    """

    record: dict[str, Any]
    images: list[tuple[bytes | Path, str]]


def or_error(convert: Callable[..., Converted], *given: Any, **options: Any) -> Converted | SampleError:
    """Return the result of a conversion, or the SampleError that it raises: what `RawData.read` yields for a row."""
    try:
        return convert(*given, **options)
    except SampleError as error:
        return error


def image_bytes(image: bytes | Path, *, where: str) -> bytes:
    """Return the bytes of an image of a `SourceSample`, or raise SampleError where its file cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise SampleError(f"{where}: image {describe_source(image)}: {error.strerror}", "missing_image") from error


def checked_image(data: bytes, name: str) -> tuple[bytes, str]:
    """Check that an image decodes to its end; return it with its file ending, formats other than JPEG and WebP as PNG.

    Metadata beyond `MAX_KEPT_BYTES` are removed; of several TIFF pages the first is used.

    Raises:
        SampleError: It does not decode (``undecodable_image``).
    """
    try:
        essential = essential_bytes(data)
        opened = load_image(essential, name=name)
        ending = _ENDINGS.get(read_header(essential, name=name)[0])
        if ending is None and has_more_pages(data, name=name):
            _warn_of_pages(name)
    except DataError as error:
        raise SampleError(str(error), "undecodable_image") from error
    if len(data) - len(essential) > MAX_KEPT_BYTES:
        data = essential
    if ending is None:
        buffer = io.BytesIO()
        opened.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    return data, ending


@lru_cache(maxsize=1)
def _warn_of_pages(name: str) -> None:
    logger.warning("%s: a TIFF of several pages, of which only the first is used; write each page as a file", name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece of the raw data that one process reads: a file, a range of a file, a row group."""

    name: str  # unique and the same in every run: the shuffle depends on it
    payload: tuple[Any, ...]  # plain values or dataclasses of them, from which `RawData.read` finds it
    rows: int | None = None  # if known without reading


class RawData(Protocol):
    """Raw data of one source: `name` for reports, `license`, and the `source` of samples that name none.

    Implementations are dataclasses whose fields hold all settings and input files, and are pickled into the processes
    that read the parts. A run is resumed if their `repr` and the sizes and times of those files are unchanged.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def license(self) -> str: ...

    def parts(self) -> Sequence[Part]:
        """List the parts in a fixed order that does not depend on the number of processes.

        Raises:
            ConfigError: The settings do not fit the data.
            DataError: Input is missing, or of an unknown schema.
        """

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield a sample, or the error of an invalid row with file and row, for each row of a part in order.

        Images must have been decoded to their end (`checked_image`), and ids should be unique.

        Raises:
            DataError: The part cannot be read; packing stops.
        """

    def input_bytes(self) -> int:
        """Estimate the bytes of all samples with their images, for the check of the disk.

        Raw data that yields images as paths also has `spool_bytes`: the same without those images.
        """
