"""Pictures made to exhaust a machine are refused by their header, in little memory and time."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.preprocessing.tiling import Tiling

ROOT = Path(__file__).resolve().parents[2]
HUGE = 60_000
ZEROS = zlib.compress(bytes(200_000_000), 9)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, before: bytes = b"", after: bytes = b"", data: bytes | None = None) -> bytes:
    """A PNG of black pixels, with further chunks before and after them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" + bytes(3 * width)) * height) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + after + chunk(b"IEND", b"")


def replaced(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite bytes at an offset from a mark."""
    at = content.index(mark) + offset
    return content[:at] + value + content[at + len(value) :]


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def animated_webp(side: int) -> bytes:
    """A WebP whose canvas is side x side and whose only frame is 4 x 4."""
    frame = encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    canvas = (side - 1).to_bytes(3, "little") * 2
    size = (3).to_bytes(3, "little") * 2
    body = riff(b"VP8X", b"\2\0\0\0" + canvas) + riff(b"ANIM", bytes(6))
    body += riff(b"ANMF", bytes(6) + size + bytes(4) + frame)
    return riff(b"RIFF", b"WEBP" + body)


def tiff(width: int, height: int, *, compression: int = 1, samples: int = 1) -> bytes:
    """A grey TIFF that promises width x height pixels and holds four bytes."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, samples), (278, 4, height), (279, 4, 4)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 12) + bytes(4) + struct.pack("<H", len(tags)) + entries + bytes(4)


def header_of(kind: str, side: int) -> bytes:
    """A file of a format whose header promises side x side pixels."""
    small = Image.new("RGB", (8, 8))
    both = {"little": struct.pack("<HH", side, side), "big": struct.pack(">HH", side, side)}
    if kind == "PNG":
        return png(side, side, data=b"")
    if kind == "JPEG":
        return replaced(encoded(small, "JPEG"), b"\xff\xc0", 5, both["big"])
    if kind == "GIF":
        return replaced(encoded(small, "GIF"), b"GIF8", 6, both["little"])
    if kind == "GIF frame":
        return replaced(encoded(small, "GIF"), b"\x2c\0\0\0\0", 5, both["little"])
    if kind == "TIFF":
        return tiff(side, side)
    if kind == "TIFF LZW":
        return tiff(side, side, compression=5)
    if kind == "WEBP canvas":
        return animated_webp(side)
    if kind == "WEBP lossy":
        return replaced(encoded(small, "WEBP"), b"\x9d\x01\x2a", 3, struct.pack("<HH", *[min(side, 16383)] * 2))
    assert kind == "WEBP lossless"
    size = min(side, 16384) - 1
    return replaced(encoded(small, "WEBP", lossless=True), b"VP8L", 9, struct.pack("<I", size | size << 14))


KINDS = ("PNG", "JPEG", "GIF", "GIF frame", "TIFF", "TIFF LZW", "WEBP canvas", "WEBP lossy", "WEBP lossless")


@pytest.mark.parametrize("side", [HUGE, 12_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_refused_by_its_header(kind, side, monkeypatch):
    def load(*_):
        raise AssertionError("decoded")

    content = header_of(kind, side)
    assert len(content) < 2000
    # 12,000 x 12,000 is below Pillow's own limit, so ours decides.
    for name in ("PIL.ImageFile.ImageFile.load", "PIL.WebPImagePlugin.WebPImageFile.load"):
        monkeypatch.setattr(name, load)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", load)
    with pytest.raises(DataError, match=r"^bomb: .*(too large to decode|expected at most 100000000)"):
        load_image(content, name="bomb")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_text_that_unpacks_to_hundreds_of_megabytes_is_not_unpacked(kind, place):
    for name in (b"a", b"Raw profile type exif", b"XML:com.adobe.xmp"):
        packed = chunk(kind, name + (b"\0\1\0\0\0" if kind == b"iTXt" else b"\0\0") + ZEROS)
        content = png(4, 4, **{place: packed})
        assert len(content) < 250_000
        tracemalloc.start()
        assert load_image(content, name="bomb").size == (4, 4)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_many_small_texts_are_not_unpacked():
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9))
    assert load_image(png(4, 4, before=text * 100), name="bomb").size == (4, 4)


def test_pixels_beyond_the_image_are_not_unpacked():
    assert load_image(png(4, 4, data=ZEROS)).size == (4, 4)


def frames(number: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((40, 40), index % 250, np.uint8)).convert("RGB") for index in range(number)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_frame_of_an_animation_is_read(kind, monkeypatch):
    options = {"lossless": True} if kind == "WEBP" else {}
    first, *others = frames(300)
    content = encoded(first, kind, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames > 200
    sought = []
    for plugin in ("Gif", "Png", "WebP", "Tiff"):
        monkeypatch.setattr(f"PIL.{plugin}ImagePlugin.{plugin}ImageFile.seek", lambda *given: sought.append(given))
    assert np.asarray(load_image(content)).max() == 0
    assert sought == []


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_damage_in_later_frames_does_not_matter(kind):
    first, *others = frames(300)
    content = encoded(first, kind, save_all=True, append_images=others)
    damaged = content[: len(content) // 2] + bytes(len(content) // 2)
    assert load_image(damaged).size == (40, 40)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_refused(size):
    jpeg = replaced(encoded(Image.new("RGB", (8, 8)), "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", *size))
    gif = replaced(encoded(Image.new("RGB", (8, 8)), "GIF"), b"GIF8", 6, bytes(4))
    gif = replaced(gif, b"\x2c\0\0\0\0", 5, bytes(4))
    for content in (png(*size, data=b""), jpeg, tiff(*size), gif):
        with pytest.raises(DataError, match=r"^empty: "):
            load_image(content, name="empty")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 65_535)])
@pytest.mark.parametrize("rule", ["ovis", "internvl"])
def test_strips_are_read_and_cut(size, rule):
    image = load_image(png(*size))
    assert image.size == size
    tiles = cut_tiles(image, Tiling(rule=rule, tile_height=32, tile_width=32))
    assert len(tiles) <= 10
    assert tiles.isfinite().all()


@pytest.mark.parametrize("size", [(1, 65_536), (90_000_000, 1), (1, 90_000_000)])
def test_columns_that_no_page_has_are_refused(size):
    with pytest.raises(
        DataError, match=rf"^bomb: image of {size[0]}x{size[1]} pixels, expected sides of at most 65535"
    ):
        load_image(png(*size, data=b""), name="bomb")


def test_a_tiff_of_thousands_of_channels_is_refused():
    with pytest.raises(DataError, match=r"^bomb: "):
        load_image(tiff(9_000, 9_000, compression=5, samples=60_000), name="bomb")


MEASURE = """
import resource, sys
from pathlib import Path
from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image
from PIL import Image
Image.init()
paths = sorted(Path(sys.argv[1]).iterdir())
def peak():  # in KiB; ru_maxrss would be at least what the process was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
for path in paths:
    try:
        load_image(path)
    except DataError:
        continue
    raise SystemExit(f"{path.name} was read")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_refusing_takes_little_memory(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).write_bytes(header_of(kind, 12_000))
    (tmp_path / "column").write_bytes(png(1, 90_000_000, data=b""))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(2 << 30)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # One of these pictures, decoded, would take over 400 megabytes.
    assert int(done.stdout) < 60_000
