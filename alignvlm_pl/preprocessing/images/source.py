"""The forms in which an image is given to `imaging.load_image`: all become a file's bytes or a PIL image.

Pillow and numpy only: tensors are recognised by their methods.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
from PIL import Image

from ...errors import ConfigError, DataError
from .metadata import essential_bytes, is_image_head

FETCH_SECONDS = 30
MAX_FETCH_SECONDS = 86_400
MAX_FETCHED_BYTES = 1 << 28
KINDS = "a path, http(s)://, file:// or data: URL, base64, bytes, a PIL image, an array or a tensor"

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
_MAX_PATH = 4096
_KEYS = ("bytes", "path", "url", "base64")  # an undecoded image of Hugging Face datasets has the first two


def is_number(value: Any) -> bool:
    """Return whether a setting is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def describe_source(source: Any) -> str:
    """Return a short name of an image for messages, at most 120 characters."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"data URL {source[5:45].split(',')[0]!r} of {len(source)} characters"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = os.fsdecode(text) if isinstance(text, bytes) else text
        return text if len(text) <= 120 else f"{text[:58]}…{text[-60:]}"
    return f"image given as {type(source).__name__}"


def resolve_source(source: Any, name: str, *, timeout: float | None = None) -> bytes | Image.Image:
    """Return the bytes of an image file, or a PIL image of any mode, for an image in any form.

    `source` is one of `KINDS`, an object with `read`, or a mapping with one of `_KEYS`; `name` stands in errors,
    `timeout` is in seconds. A DataError if the form is none of these, or what it names cannot be read.
    """
    if timeout is not None and not (is_number(timeout) and 0 < timeout <= MAX_FETCH_SECONDS):
        raise ConfigError(f"timeout={timeout!r:.40}, expected seconds above 0, at most {MAX_FETCH_SECONDS}")
    if isinstance(source, (bytes, Image.Image)):
        return source
    if isinstance(source, (bytearray, memoryview)):
        try:
            return bytes(source)
        except ValueError as error:
            raise DataError(f"{name}: cannot be read ({error})") from error
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return _from_text(path, name, timeout) if isinstance(path, str) else _read(path, name)
    if isinstance(source, Mapping):
        key = next((key for key in _KEYS if source.get(key) is not None), None)
        if key is None:
            raise DataError(
                f"{name}: expected one of the keys {', '.join(_KEYS)}, found {', '.join(map(str, source))[:60]}"
            )
        given = source[key]
        if isinstance(given, Mapping):
            raise DataError(f"{name}: {key!r} is a mapping; expected {KINDS}")
        if key == "base64" and isinstance(given, (bytes, bytearray)):
            given = given.decode("ascii", "replace")
        if key == "base64" and isinstance(given, str) and given[:5].lower() != "data:":
            return decode_base64(given, "base64 image")
        return resolve_source(given, describe_source(given), timeout=timeout)
    if hasattr(source, "__array__"):
        return array_to_image(source, name)
    if hasattr(source, "read"):
        return _from_stream(source, name)
    raise DataError(f"{name}: expected {KINDS}")


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64: with or without padding, line breaks and percents, of the usual or the URL-safe alphabet.

    Raises a DataError for other text.
    """
    packed = "".join(unquote(text).split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: not base64 ({error})") from error


def array_to_image(source: Any, name: str) -> Image.Image:
    """Convert an array or tensor to a PIL image of mode L, RGB or RGBA; `name` stands in errors.

    The shape is (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4; channels first if both fit, as in transformers.
    Values are integers in [0, 255], uint16 in [0, 65535], booleans, or floating point in [0, 1] or whole in [0, 255];
    others, and other shapes, are a DataError.
    """
    try:
        if hasattr(source, "detach"):
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # numpy knows no bfloat16
        values = np.asarray(source)
    except Exception as error:  # sparse, or on the meta device; or of any class
        raise DataError(f"{name}: has no values ({error}); expected a dense array or tensor") from error
    return Image.fromarray(_to_uint8(_channels_last(values, name), name))


def _channels_last(values: np.ndarray, name: str) -> np.ndarray:
    shape = values.shape
    if values.size and values.ndim == 2:
        return values
    for channels in ((1, 3), (4,)) if values.size and values.ndim == 3 else ():
        if shape[0] in channels or shape[-1] in channels:
            values = values.transpose(1, 2, 0) if shape[0] in channels else values
            return values[..., 0] if values.shape[-1] == 1 else values
    raise DataError(
        f"{name}: array of shape {shape}, expected one image: (height, width), (height, width, channels) or (channels, "
        "height, width) with 1, 3 or 4 channels"
    )


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return np.rint(values / 257).astype(np.uint8)  # 65535 / 255
    if values.dtype.kind not in "iuf":
        raise DataError(f"{name}: array of {values.dtype}, expected integers or floating point")
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind != "f" or (high > 1 and bool((values == np.rint(values)).all()))
    if not (low >= 0 and high <= (255 if whole else 1)):  # NaN fails as well
        raise DataError(
            f"{name}: array of {values.dtype} in [{low:.4g}, {high:.4g}], expected pixels in [0, 255], or floating "
            "point in [0, 1]; pass the image before it is normalised"
        )
    return np.rint(values * (1 if whole else 255)).astype(np.uint8)


def _from_text(text: str, name: str, timeout: float | None) -> bytes:
    """Read a path or URL, or decode base64; an existing file comes first."""
    found = _SCHEME.match(text[:64])
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        return _from_data_url(text, name)
    if len(text) > _MAX_PATH:  # no path is as long
        return decode_base64(text, f"image given as text of {len(text)} characters")
    if ("://" in text or scheme == "file") and not os.path.exists(text):
        if scheme in ("http", "https"):
            return _fetch(text, name, timeout)
        if scheme != "file":
            raise DataError(f"{name}: scheme {scheme!r} is not read; expected {KINDS}")
        return _read(_local_path(text, name), name)
    try:
        return _read(text, name)
    except DataError:
        with suppress(DataError):
            if is_image_head((content := decode_base64(text, name))[:16]):
                return content
        raise


def _local_path(url: str, name: str) -> str:
    try:
        found = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{name}: not a URL ({error}); write file:///path") from error
    if found.netloc.lower() not in ("", "localhost"):
        raise DataError(f"{name}: a file of the host {found.netloc[:60]!r}, which is not read; write file:///path")
    return url2pathname(found.path)


def _from_data_url(text: str, name: str) -> bytes:
    header, comma, content = text.partition(",")
    if not comma:
        raise DataError(f"{name}: no comma; expected data:image/png;base64,…")
    packed = "".join(header.lower().split()).endswith(";base64")
    return decode_base64(content, name) if packed else unquote_to_bytes(content)


def _from_stream(stream: Any, name: str) -> bytes:
    """Read a stream, from its beginning where it can go there, as Pillow does."""
    try:
        if hasattr(stream, "seek") and getattr(stream, "seekable", lambda: True)():
            stream.seek(0)
        content = stream.read()
    except Exception as error:  # those of any class with these methods
        raise DataError(f"{name}: cannot be read ({str(error)[:100]}); open it for reading, in binary mode") from error
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise DataError(f"{name}: read() gave {type(content).__name__}, expected bytes; open the file in binary mode")
    return bytes(content)


def _read(path: str | bytes, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return essential_bytes(file)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read ({reason}); check the path") from error


def _fetch(url: str, name: str, timeout: float | None) -> bytes:
    try:
        request = Request(url, headers={"User-Agent": "alignvlm_pl"})
        with urlopen(request, timeout=FETCH_SECONDS if timeout is None else timeout) as response:
            content = bytes(response.read(MAX_FETCHED_BYTES + 1))
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"{name}: cannot be fetched ({str(error)[:100]}); check the URL, or give a file") from error
    if len(content) > MAX_FETCHED_BYTES:
        raise DataError(f"{name}: more than {MAX_FETCHED_BYTES} bytes; fetch the file yourself and give its path")
    return content
