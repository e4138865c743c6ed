"""The interface of raw data that can be packed (`RawData`), and the samples that it is converted to."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.images.metadata import MAX_KEPT_BYTES, essential_bytes
from alignvlm_pl.preprocessing.imaging import has_more_pages, load_image, read_header

from ...shards.sample import SampleError

logger = logging.getLogger(__name__)
Converted = TypeVar("Converted")
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One converted row: its JSON in the sample schema, and content and file ending of each image, by its index.

    `where` names the row in errors: its file, and where it stands in it.
    """

    record: dict[str, Any]
    images: list[tuple[bytes, str]]
    where: str


def or_error(convert: Callable[..., Converted], *given: Any, **options: Any) -> Converted | SampleError:
    """Return the result of a conversion, or the SampleError that it raises."""
    try:
        return convert(*given, **options)
    except SampleError as error:
        return error


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


class RawData(Protocol):
    """Raw data of one source: `name` for reports, `license`, and the `source` of samples that name none.

    Implementations are dataclasses whose fields hold all settings; they are pickled into the processes that convert
    rows. A run is resumed if their `repr` and the sizes and times of their `inputs` are unchanged.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def license(self) -> str: ...

    def inputs(self) -> Iterable[Path]:
        """Yield the files of this disk that `rows` reads."""

    def num_rows(self) -> int | None:
        """Check the data, and return its number of rows; None if that is not known before all are read.

        Raises:
            ConfigError: The settings do not fit the data.
            DataError: Input is missing, or of an unknown schema.
        """

    def parts(self) -> Sequence[Any]:
        """Return what the rows lie in, such as files, in a fixed order; a resumed run skips those that it has read."""

    def rows(self, part: Any) -> Iterator[Any]:
        """Yield the rows of a part in a fixed order: what `sample` converts, in any process, or the SampleError of one.

        Raises:
            DataError: Input is damaged; packing stops.
        """

    def sample(self, row: Any) -> SourceSample | None:
        """Convert a row; None if it is not wanted.

        Images must have been decoded to their end (`checked_image`), and ids should be unique.

        Raises:
            SampleError: The row is invalid; the message names file and row.
        """
