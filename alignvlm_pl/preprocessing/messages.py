"""Messages as chat clients write them: a field that the prompt would not show is refused by its name."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, nearest
from .images.source import KINDS

_MESSAGE = ("role", "content")
_IMAGE = ("image", "url", "path", "base64")
_PARTS = {"text": ("type", "text"), "image": ("type", *_IMAGE), "image_url": ("type", "image_url")}


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a conversation with OpenAI's `image_url` parts as image parts; the caller's is not changed.

    A field that is None or empty counts as absent, as in transformers. A DataError for what is no mapping, a field that
    no prompt shows (`tool_calls`, `name`, …), a text part without text, or an image part with two images.
    """
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(f"a message must be a mapping with role and content, found {type(message).__name__}")
        _require_known(message, _MESSAGE, where, "put it into the content as text, or leave it out")
        kept = {name: message[name] for name in _MESSAGE if name in message}
        if isinstance(content := kept.get("content"), (list, tuple)):
            kept["content"] = [_plain_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
        plain.append(kept)
    return plain


def message_images(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Return what the image parts of a plain conversation carry, in reading order; a DataError if one carries none."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    found = [_part_image(part) for part in parts if part["type"] == "image"]
    if any(image is None for image in found):
        raise DataError(f'an image part carries no image: expected {{"type": "image", "image": …}} with {KINDS}')
    return found


def _require_known(fields: Mapping[str, Any], known: Sequence[str], where: str, cure: str) -> None:
    for name, value in fields.items():
        if name in known or value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value):
            continue
        raise DataError(
            f"{where} has the field {str(name)[:60]!r}, which no prompt shows; {nearest(str(name), known)}; {cure}"
        )


def _plain_part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not (isinstance(kind, str) and kind in _PARTS):
        return part  # named where the conversation is rendered
    _require_known(part, _PARTS[kind], where, "a part holds one text or one image")
    if kind == "text" and part.get("text") is None:
        raise DataError(f"{where} is a text part without 'text'; give the text, or leave the part out")
    if kind == "image_url":
        given = part.get("image_url")
        if isinstance(given, Mapping):
            asked = {name: value for name, value in given.items() if (name, value) != ("detail", "auto")}
            _require_known(asked, ("url",), f"{where}.image_url", "the processor's images_kwargs set the tiling")
            given = given.get("url")
        return {"type": "image", "url": given}
    given = [name for name in _IMAGE if part.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{where} carries an image under {given[0]!r} and under {given[1]!r}; leave one")
    return part


def _part_image(part: dict[str, Any]) -> Any:
    if part.get("base64") is not None:
        return {"base64": part["base64"]}
    return next((part[name] for name in _IMAGE if part.get(name) is not None), None)
