"""What every source yields."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.imaging import load_image

from ..sample import SampleError

_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One question on its way into a shard.

    Attributes:
        record: Its JSON in normal form.
        images: Bytes and file ending of each picture, in the order of their index.
    """

    record: dict[str, Any]
    images: list[tuple[bytes, str]]


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
