"""What every source yields."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image

from ...shards.sample import SampleError

_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One question on its way into a shard.

    Attributes:
        record: Its JSON in normal form.
        images: Bytes and file ending of each picture, in the order of their index; a path stands for the bytes of
            its file, which are read again when the sample is written.
    """

    record: dict[str, Any]
    images: list[tuple[bytes | Path, str]]


def image_bytes(image: bytes | Path, *, where: str) -> bytes:
    """Return the bytes of a picture of a `SourceSample`.

    Raises:
        SampleError: Its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise SampleError(f"{where}: image {image}: {error.strerror}", "missing_image") from error


def checked_image_file(path: Path, *, where: str) -> tuple[bytes | Path, str]:
    """Return the picture of a file that decodes to its end: its path, or its bytes where shards need another format.

    Raises:
        SampleError: The file cannot be read, or does not decode.
    """
    data = image_bytes(path, where=where)
    checked, ending = checked_image(data, f"{where}: image {path}")
    return (path if checked is data else checked), ending


def checked_image(data: bytes, name: str) -> tuple[bytes, str]:
    """Return a picture that decodes to its end, with its file ending; formats that shards do not take become PNG.

    Raises:
        SampleError: It does not decode.
    """
    try:
        opened = load_image(data, name=name)
        with Image.open(io.BytesIO(data)) as header:
            ending = _ENDINGS.get(str(header.format))
    except DataError as error:
        raise SampleError(str(error), "undecodable_image") from error
    if ending is None:
        buffer = io.BytesIO()
        opened.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    return data, ending
