"""Kinds of damage of one sample: what is done to its files."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.integration.damage_world import KEYS, TARGET, Files, encoded, picture, record

Change = Callable[[Files], Files]
EXTENSIONS = ("png", "jpg", "jpeg", "webp")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, with a few bytes of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def strip_of_20000() -> bytes:
    return encoded(Image.fromarray(np.arange(20_000, dtype=np.uint8)[:, None]), "PNG")


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)), "PNG")


def cmyk() -> bytes:
    buffer = io.BytesIO(picture("PNG"))
    return encoded(Image.open(buffer).convert("CMYK"), "JPEG")


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("white", "black", "red")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def flipped(data: bytes, *, start: int, stop: int) -> bytes:
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start:stop]) + data[stop:]


HTML = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
BOMB = png_of(60_000, 60_000)
JPEG = picture("JPEG")


def is_picture(name: str) -> bool:
    return name.rpartition(".")[2] in EXTENSIONS


def with_picture(data: bytes) -> Change:
    """The same sample with another picture, under the name of the old one, of which the json says nothing more."""

    def change(own: Files) -> Files:
        own = [(name, data if is_picture(name) else old) for name, old in own]
        return with_json(record())(own) if "messages" in json.loads(dict(own)[f"{TARGET}.json"]) else own

    return change


def with_member(extension: str, data: bytes) -> Change:
    return lambda own: [(name, data if name.endswith(extension) else old) for name, old in own]


def with_json(value: Any) -> Change:
    return with_member(".json", value if isinstance(value, bytes) else json.dumps(value).encode())


def renamed(old: str, new: str) -> Change:
    return lambda own: [(name.removesuffix(old) + new if name.endswith(old) else name, d) for name, d in own]


def without(*extensions: str) -> Change:
    return lambda own: [(name, data) for name, data in own if not name.endswith(extensions)]


def called(key: str) -> Change:
    return lambda own: [(name.replace(TARGET, key), data) for name, data in own]


def turns(*content: Any) -> dict[str, Any]:
    """A record whose user's turn has this content."""
    return record() | {"messages": [{"role": "user", "content": list(content)}, record()["messages"][1]]}


IMAGE = {"type": "image", "index": 0}
NULL_CONTENT = turns()
NULL_CONTENT["messages"][0]["content"] = None
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

NORMAL: dict[str, Change] = {
    "member twice": lambda own: [*own, own[-1]],
    "picture called .txt": renamed(".0.png", ".txt"),
    "json called .jsn": renamed(".json", ".jsn"),
    "no json": without(".json"),
    "no picture": without(".png"),
    "json a list": with_json([1, 2]),
    "json empty": with_json(b""),
    "json cut": lambda own: [(own[0][0], own[0][1][:50]), *own[1:]],
    "no messages": with_json({"images": [{"file": "0.png"}]}),
    "null messages": with_json(record(messages=None)),
    "null content": with_json(NULL_CONTENT),
    "null text": with_json(turns(IMAGE, {"type": "text", "text": None})),
    "json not UTF-8": with_json(json.dumps(record()).encode().replace(b"a page", b"\xff\xfepage")),
    "json nested deeply": with_json(NESTED),
    "half a surrogate pair": with_json(record("\ud83d")),
    "two placeholders": with_json(turns(IMAGE, IMAGE)),
    "no placeholder": with_json(turns({"type": "text", "text": "?"})),
    "placeholder of another index": with_json(turns({"type": "image", "index": 7})),
    "empty answer": with_json(record("")),
    "no answer": with_json(record(None)),
    "picture of 0x0": with_picture(png_of(0, 0)),
    "picture of 1x20000": with_picture(strip_of_20000()),
    "CMYK JPEG": with_picture(cmyk()),
    "16-bit PNG": with_picture(sixteen_bit()),
    "animated GIF": with_picture(animated("GIF")),
    "animated WEBP": with_picture(animated("WEBP")),
    "picture of another size": lambda own: [own[0], (own[1][0], picture(size=(44, 30)))],
    "JPEG cut": with_picture(JPEG[: len(JPEG) // 2]),
    "JPEG header flipped": with_picture(flipped(JPEG, start=160, stop=170)),
    "picture empty": with_picture(b""),
    "HTML page as picture": with_picture(HTML),
    "decompression bomb": with_picture(BOMB),
    "key of another shard": called(KEYS[0]),
    "sample in two parts": lambda own: [own[0], (f"{KEYS[6]}x.json", json.dumps(turns()).encode()), own[1]],
}

CAPTIONS: dict[str, Change] = {
    "picture called .txt": renamed(".jpg", ".txt"),
    "picture called .jpg_large": renamed(".jpg", ".jpg_large"),
    "json called .jsn": renamed(".json", ".jsn"),
    "no json": without(".json"),
    "no picture": without(".jpg"),
    "no txt": without(".txt"),
    "neither json nor txt": without(".json", ".txt"),
    "empty txt": with_member(".txt", b" \n"),
    "txt not UTF-8": with_member(".txt", b"caf\xe9 \xff"),
    "json a list": with_json([]),
    "json not UTF-8": with_json(b'{"caption": "caf\xe9"}'),
    "json nested deeply": with_json(NESTED),
    "CMYK JPEG": with_picture(cmyk()),
    "animated GIF": with_picture(animated("GIF")),
    "JPEG cut": with_picture(JPEG[: len(JPEG) // 2]),
    "HTML page as picture": with_picture(HTML),
    "picture of 0x0": with_picture(png_of(0, 0)),
    "decompression bomb": with_picture(BOMB),
    "key with dots": called("2301.01234_p1"),
    "key not UTF-8": called("caf\udce9"),
}
