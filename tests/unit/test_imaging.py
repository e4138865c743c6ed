"""Reading every kind of image file as upright RGB on white, refusing bad ones, and normalised tiles."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.preprocessing.imaging import load_image, to_rgb
from alignvlm_pl.preprocessing.tiling import Tiling

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 5, y * 7, x + y], axis=-1).astype(np.uint8))


def pixels(source, **options):
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_bytes_and_path_give_the_same_pixels(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(encoded(photo()))
    expected = np.asarray(photo())
    np.testing.assert_array_equal(pixels(path.read_bytes()), expected)
    np.testing.assert_array_equal(pixels(path), expected)
    np.testing.assert_array_equal(pixels(str(path)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 128)])
    clear, solid, half = pixels(encoded(image.convert(mode)))[0]
    assert (tuple(clear), tuple(solid)) == (WHITE, BLACK)
    assert 120 <= half[0] <= 134


def test_palette_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLACK])
    image.putdata([0, 1])
    assert pixels(encoded(image)).tolist() == [[list(RED), list(BLACK)]]
    assert pixels(encoded(image, transparency=1)).tolist() == [[list(RED), list(WHITE)]]
    assert pixels(encoded(image, transparency=bytes([255, 0]))).tolist() == [[list(RED), list(WHITE)]]


def test_transparent_colour_without_a_palette():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (1, 2, 3))
    assert pixels(encoded(image, transparency=(1, 2, 3))).tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_stretched():
    values = np.array([[-2.0, 0.0, 2.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    assert to_rgb(Image.new("F", (1, 1), 7.0)).getpixel((0, 0)) == BLACK


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(value):
    image = Image.fromarray(np.array([[1.0, value, value]], dtype=np.float32))
    said = "2 of the 3 pixels of an image of mode F are NaN or infinite; give them a finite value"
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(DataError, match=f"^p: {said}"):
            load_image(source, name="p")
    with pytest.raises(DataError, match=f"^{said}"):
        cut_tiles(image, Tiling())


def test_one_bit_grey_and_cmyk():
    assert pixels(encoded(Image.new("1", (1, 1), 1))).tolist() == [[list(WHITE)]]
    assert pixels(encoded(Image.new("L", (1, 1), 9))).tolist() == [[[9, 9, 9]]]
    cmyk = pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))[4, 4]
    np.testing.assert_allclose(cmyk, RED, atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.asarray(photo())
    # What a camera stores, i.e. the inverse of what the tag asks the reader to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels(content), upright)


def test_damaged_exif_does_not_matter():
    content = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert load_image(content).size == (40, 30)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLACK)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(pixels(content)[0, 0]) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_refused_by_name(kind):
    content = encoded(Image.effect_noise((200, 200), 90), kind)
    with pytest.raises(DataError, match=r"^train-0003.tar, doc-17.0: "):
        load_image(content[: len(content) // 2], name="train-0003.tar, doc-17.0")


def test_damaged_bytes_are_refused():
    content = bytearray(encoded(photo()))
    content[60:90] = bytes(30)
    with pytest.raises(DataError, match=r"page: PNG image of 40x30 pixels does not decode .* damaged"):
        load_image(bytes(content), name="page")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.png: the image file is empty"),
        (
            b"<html>404</html>",
            r"a.png: not an image .*\(16 bytes starting with b'<html>40': an HTML page\); known",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", "a.png: not an image that can be read"),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(DataError, match=message):
        load_image(content, name="a.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png: cannot be read \(No such file or directory\)"):
        load_image(tmp_path / "nowhere.png")


def png_header(width, height):
    """A PNG that promises width x height pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(10_001, 10_000), (12_000, 12_000), (60_000, 60_000)])
def test_bombs_are_refused_before_decoding(size, monkeypatch):
    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"bomb.png: .*scale"):
            load_image(png_header(*size), name="bomb.png")


def test_limit_is_a_setting_and_inclusive():
    content = encoded(photo(40, 30))
    assert load_image(content, max_pixels=1200).size == (40, 30)
    with pytest.raises(DataError, match="image of 40x30 pixels, expected at most 1199 in all"):
        load_image(content, max_pixels=1199)


def test_tiles_are_normalised_centred_and_padded_with_zero():
    tiles = cut_tiles(Image.new("RGB", (20, 10), (255, 0, 51)), Tiling(tile_height=40, tile_width=40)).numpy()
    assert tiles.shape == (1, 3, 40, 40)
    assert tiles.dtype == np.float32
    np.testing.assert_allclose(tiles[0, :, 10:30].mean(axis=(1, 2)), [1.0, -1.0, -0.6], atol=1e-6)
    assert not tiles[0, :, :10].any()
    assert not tiles[0, :, 30:].any()


def test_tiles_reassemble_the_image():
    image = photo(96, 64)
    tiling = Tiling(tile_height=32, tile_width=32, thumbnail="none")
    for rule in ("ovis", "internvl"):
        tiles = cut_tiles(image, Tiling(**{**tiling.to_dict(), "rule": rule})).numpy()
        rows = [np.concatenate(tiles[row * 3 : row * 3 + 3], axis=2) for row in range(2)]
        page = np.concatenate(rows, axis=1).transpose(1, 2, 0)
        np.testing.assert_allclose((page + 1) * 127.5, np.asarray(image), atol=1e-3)


@pytest.mark.parametrize(("where", "index"), [("first", 0), ("last", -1)])
@pytest.mark.parametrize("rule", ["ovis", "internvl"])
def test_thumbnail_shows_the_whole_image(rule, where, index):
    image = Image.new("RGB", (64, 32), WHITE)
    image.paste(BLACK, (0, 0, 32, 32))
    tiles = cut_tiles(image, Tiling(rule=rule, tile_height=32, tile_width=32, thumbnail=where))
    assert len(tiles) == 3
    assert tiles[index, 0, 16, 4] == -1
    assert tiles[index, 0, 16, 28] == 1
    assert (tiles[index, 0, 2, 4] == 0) == (rule == "ovis")


def test_tiles_of_a_transparent_image_are_on_white():
    tiles = cut_tiles(Image.new("RGBA", (8, 8)), Tiling(tile_height=8, tile_width=8))
    assert (tiles == 1).all()
