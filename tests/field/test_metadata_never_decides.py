"""Metadata that nobody needs decide nothing about the pixels of an image, in any format.

Sources: python-pillow/Pillow#2445, #5610, #8363; hiyouga/LLaMA-Factory#6300.
"""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.preprocessing.imaging import load_image, read_header
from datamodules.prepare.sources.source import checked_image

PAGE = Image.radial_gradient("L").resize((112, 56)).convert("RGB")
MIB = 1 << 20


def encoded(kind, **options):
    buffer = io.BytesIO()
    PAGE.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks):
    plain = encoded("PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def jpeg(*segments):
    plain = encoded("JPEG", quality=95)
    parts = [bytes([255, kind]) + struct.pack(">H", len(data) + 2) + data for kind, data in segments]
    return plain[:2] + b"".join(parts) + plain[2:]


def gif(*extensions):
    plain = encoded("GIF")
    start = 13 + 3 * 2 ** ((plain[10] & 7) + 1)
    return plain[:start] + b"".join(extensions) + plain[start:]


def webp(*chunks):
    plain = encoded("WEBP", lossless=True)
    size = [(side - 1).to_bytes(3, "little") for side in PAGE.size]
    parts = [(b"VP8X", bytes([0x2C, 0, 0, 0]) + b"".join(size)), *chunks]
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(plain) - 12) + b"WEBP" + body + plain[12:]


def jp2(box):
    plain = encoded("JPEG2000")
    at = plain.index(b"jp2c") - 4
    return plain[:at] + struct.pack(">I", 8 + len(box)) + b"xml " + box + plain[at:]


LARGE = zlib.compress(bytes(3 * MIB // 2))
IMAGES = {
    "zTXt of 1.5 MiB": png(chunk(b"zTXt", b"parameters\0\0" + LARGE)),
    "iTXt of 1.5 MiB": png(chunk(b"iTXt", b"parameters\0\1\0\0\0" + LARGE)),
    "iCCP of 1.5 MiB": png(chunk(b"iCCP", b"profile\0\0" + LARGE)),
    "tEXt of 80 MiB": png(*[chunk(b"tEXt", b"k\0" + bytes(MIB))] * 80),
    "unknown compression": png(chunk(b"zTXt", b"k\0\7" + LARGE)),
    "text with another checksum": png(b"\0\0\0\2tEXtk\0" + bytes(4)),
    "short gAMA, pHYs, sRGB": png(chunk(b"gAMA", b""), chunk(b"pHYs", b"1"), chunk(b"sRGB", b"")),
    "broken animation": png(chunk(b"acTL", b"1")),
    "broken EXIF": png(chunk(b"eXIf", b"garbage")),
    "text after the pixels": encoded("PNG")[:-12] + chunk(b"zTXt", b"k\0\0" + LARGE) + encoded("PNG")[-12:],
    "JPEG, short profile": jpeg((0xE2, b"ICC_PROFILE\0")),
    "JPEG, short JFIF": jpeg((0xE0, b"JFIF")),
    "JPEG, short Adobe": jpeg((0xEE, b"Adobe")),
    "JPEG, broken MPF and Photoshop": jpeg((0xE2, b"MPF\0junk"), (0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0")),
    "JPEG, broken EXIF": jpeg((0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "GIF, comment of 2 MiB": gif(b"\x21\xfe" + (b"\xff" + bytes(255)) * 8192 + b"\0"),
    "WebP, junk": webp((b"ICCP", b"junk"), (b"EXIF", b"junk"), (b"XMP ", b"<x"), (b"ABCD", b"junk")),
    "JPEG 2000, XML of 3 MiB": jp2(bytes(3 * MIB)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_pixels_are_those_without_the_metadata(name):
    found = load_image(IMAGES[name], name=name)
    kind, size = read_header(IMAGES[name], name=name)
    assert size == found.size == PAGE.size
    plain = load_image(encoded(kind, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})))
    assert np.array_equal(np.asarray(found), np.asarray(plain))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_orientation_is_kept(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(kind, exif=exif)
    upright = PAGE.size if orientation == 1 else PAGE.size[::-1]
    assert load_image(content).size == read_header(content, name="page")[1] == upright


def test_the_orientation_is_found_after_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded("PNG")
    content = plain[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    assert load_image(content).size == read_header(content, name="page")[1] == PAGE.size[::-1]


def test_a_chunk_of_200_megabytes_costs_no_memory(tmp_path):
    packed = zlib.compress(bytes(200_000_000), 9)
    path = tmp_path / "page.png"
    plain = encoded("PNG")
    with path.open("wb") as stream:  # sparse: the chunk takes no space on the disk
        stream.write(plain[:33] + chunk(b"zTXt", b"k\0\0" + packed) + struct.pack(">I", 200_000_000) + b"tEXt")
        stream.seek(200_000_004, io.SEEK_CUR)
        stream.write(plain[33:])
    tracemalloc.start()
    assert load_image(path).size == PAGE.size
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_large_metadata_are_not_copied_into_shards():
    data, ending = checked_image(IMAGES["tEXt of 80 MiB"], "page")
    assert ending == "png" and len(data) < 10_000
    small = png(chunk(b"tEXt", b"k\0text"))
    assert checked_image(small, "page") == (small, "png")
