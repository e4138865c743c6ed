"""One function turns an image in any form into pixels, or names the forms.

voxel51/fiftyone#5359, transformers#35806, MoE-LLaVA#11: arrays, tensors and URLs where a path was expected.
"""

import base64
import gzip
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.preprocessing.imaging import load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
PNG = io.BytesIO()
Image.fromarray(PIXELS).save(PNG, "PNG")
PNG = PNG.getvalue()
TEXT = base64.b64encode(PNG).decode()


class Pipe(io.RawIOBase):
    """A stream that cannot go back, such as a response or a pipe."""

    def __init__(self, content):
        self.rest = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.rest.readinto(buffer)


class Reader:
    """An object with `read` alone."""

    def __init__(self, content):
        self.read = lambda: content


def closed():
    stream = io.BytesIO(PNG)
    stream.close()
    return stream


class Nothing:
    def __array__(self, *_, **__):
        return 1 // 0


def released():
    view = memoryview(PNG)
    view.release()
    return view


def loop():
    found = {}
    found["path"] = found
    return found


FORMS = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "file object": io.BytesIO(PNG),
    "stream that cannot seek": Pipe(PNG),
    "buffered pipe": io.BufferedReader(Pipe(PNG)),
    "reader": Reader(PNG),
    "reader of a bytearray": Reader(bytearray(PNG)),
    "pil": Image.fromarray(PIXELS),
    "numpy": PIXELS,
    "channels first": PIXELS.transpose(2, 0, 1),
    "int64": PIXELS.astype(np.int64),
    "big-endian int32": PIXELS.astype(">i4"),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "big-endian uint16": (PIXELS.astype(np.uint16) * 257).astype(">u2"),
    "channels of uint16 first": PIXELS.transpose(2, 0, 1).astype(np.uint16) * 257,
    "float in 0..255": PIXELS.astype(np.float32),
    "float in 0..1": PIXELS / 255,
    "opaque": np.concatenate([PIXELS, np.full((40, 90, 1), 255, np.uint8)], axis=2),
    "tensor": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "tensor with gradient": (torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255).requires_grad_(),
    "data URL": f"data:image/png;base64,{TEXT}",
    "data URL of base64 and percents": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "data URL with spaces": f"data:image/png; base64 ,{TEXT}",
    "data URL of percents": f"data:image/png,{quote_from_bytes(PNG)}",
    "base64": TEXT,
    "base64 as bytes": {"base64": TEXT.encode()},
    "base64 and percents": {"base64": quote(TEXT, safe="")},
    "base64 in lines": base64.encodebytes(PNG).decode(),
    "URL-safe base64": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "undecoded of datasets": {"bytes": PNG, "path": None},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return build_processor(tiny_spec(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("form", FORMS)
def test_the_pixels_do_not_depend_on_the_form(form):
    image = load_image(FORMS[form])
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("name", ["page.png", "a page, 100%.png", "http_page.png", "no_ending"])
def test_files_by_path_and_url(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(PNG)
    os.chdir(tmp_path)
    for form in (path, str(path), os.fsencode(path), path.as_uri(), name):
        if isinstance(form, bytes):
            continue  # bytes are an image, not a path
        np.testing.assert_array_equal(np.asarray(load_image(form)), PIXELS)


def test_a_url_is_fetched_and_its_failure_is_one_line():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/page.png" else 404)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(np.asarray(load_image(f"{url}/page.png", timeout=5)), PIXELS)
        with pytest.raises(DataError, match=r"/none\.png: cannot be fetched \(HTTP Error 404"):
            load_image(f"{url}/none.png", timeout=5)
        server.shutdown()
    with pytest.raises(DataError, match=r"page\.png: cannot be fetched"):
        load_image(f"{url}/page.png", timeout=5)


def test_grey_deep_boolean_and_transparent_arrays():
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    deep = grey.astype(np.uint16) * 257
    for form in (grey, grey[..., None], grey[None], deep, deep.astype(">u2"), torch.from_numpy(grey.copy())):
        np.testing.assert_array_equal(np.asarray(load_image(form)), expected)
    half = torch.from_numpy(grey > 127)
    np.testing.assert_array_equal(np.asarray(load_image(half))[..., 0], np.where(grey > 127, 255, 0))
    np.testing.assert_array_equal(np.asarray(load_image(half.to(torch.bfloat16))), np.asarray(load_image(half)))
    clear = np.dstack([PIXELS, np.zeros((40, 90), np.uint8)])
    assert (np.asarray(load_image(clear)) == 255).all()


WRONG = {
    "number": (5, "image given as int: expected a path"),
    "nested list": (PIXELS.tolist(), "image given as list: expected a path"),
    "None": (None, "image given as NoneType: expected a path"),
    "normalised": (PIXELS / 127.5 - 1, r"in \[-1, 1\], expected pixels in \[0, 255\]"),
    "NaN": (np.full((4, 4, 3), np.nan), r"in \[nan, nan\]"),
    "too large": (np.full((4, 4, 3), 300), r"in \[300, 300\]"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), r"array of shape \(9, 9, 2\), expected one image"),
    "batch": (np.zeros((2, 9, 9, 3), np.uint8), r"array of shape \(2, 9, 9, 3\), expected one image"),
    "empty": (np.zeros((0, 9, 3), np.uint8), r"array of shape \(0, 9, 3\)"),
    "strings": (np.array([["a"]]), "expected integers or floating point"),
    "scheme": ("s3://bucket/page.png", r"s3://bucket/page\.png: scheme 's3' is not read; expected a path, http"),
    "absent": ("file:///none/page.png", r"page\.png: cannot be read \(No such file or directory\)"),
    "question": ("what is this?", r"what is this\?: cannot be read"),
    "null byte": ("a\0b", "cannot be read"),
    "no image": ("data:image/png;base64," + base64.b64encode(bytes(5000)).decode(), "not an image that can be read"),
    "no base64": ("data:image/png;base64,%%%" + "A" * 5000, "data URL .* of 5025 characters: not base64"),
    "no comma": ("data:image/png;base64" + "A" * 5000, "no comma"),
    "long text": ("?" * 100_000, "image given as text of 100000 characters: not base64"),
    "long path": ("/none" * 500, "cannot be read"),
    "text file": (io.TextIOWrapper(io.BytesIO(PNG), "latin-1"), r"TextIOWrapper: read\(\) gave str, expected bytes"),
    "text": (io.StringIO("x"), r"StringIO: read\(\) gave str, expected bytes"),
    "closed file": (closed(), r"BytesIO: cannot be read \(.*closed file"),
    "broken stream": (gzip.GzipFile(fileobj=io.BytesIO(b"x" * 99)), r"GzipFile: cannot be read \(Not a gzipped file"),
    "reader of nothing": (Reader(None), r"read\(\) gave NoneType"),
    "mapping of itself": (loop(), "image given as dict: 'path' is a mapping; expected a path"),
    "no memory": (torch.zeros(3, 9, 9, device="meta"), "image given as Tensor: has no values"),
    "array that fails": (Nothing(), "image given as Nothing: has no values"),
    "released": (released(), "image bytes: cannot be read"),
    "sparse": (torch.zeros(9, 9).to_sparse(), "image given as Tensor: has no values"),
    "durations": (np.zeros((9, 9), "m8[s]"), "expected integers or floating point"),
    "mapping": ({"bytes": None}, "expected one of the keys bytes, path, url, base64, found bytes"),
}


@pytest.mark.parametrize("form", WRONG)
def test_what_is_no_image_is_named_in_one_short_line(form, processor):
    source, match = WRONG[form]
    with pytest.raises(DataError, match=match) as caught:
        load_image(source)
    assert len(str(caught.value)) <= 400
    part = {"type": "image", "image": source}
    with pytest.raises(DataError) as caught:
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)
    assert len(str(caught.value)) <= 400
    assert "\n" not in str(caught.value)


PARTS = [
    {"type": "image", "image": PIXELS},
    {"type": "image", "base64": TEXT},
    {"type": "image", "url": f"data:image/png;base64,{TEXT}"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT}"}},
    {"type": "image_url", "image_url": f"data:image/png;base64,{TEXT}"},
]


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_message_as_transformers_and_openai_write_them(part, processor):
    expected = processor(images=Image.fromarray(PIXELS), text="<|im_start|>user\n<image><|im_end|>\n")
    conversation = [{"role": "user", "content": [part]}]
    found = processor.apply_chat_template(conversation, tokenize=True)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert conversation[0]["content"][0] is part  # as it was


def test_several_arrays_in_one_call(processor):
    one = processor(images=[PIXELS, PIXELS], text=["<image>a", "<image>b"])
    stacked = processor(images=np.stack([PIXELS, PIXELS]), text=["<image>a", "<image>b"])
    dealt = processor(images=[PIXELS, PIXELS, PIXELS], text=["<image><image>a", "b", "<image>"])
    assert torch.equal(one["pixel_values"], stacked["pixel_values"])
    assert dealt["num_tiles"].tolist() == [2 * int(one["num_tiles"][0]), 0, int(one["num_tiles"][0])]


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": "x"}, "a message has no 'role'"),
        ({"role": "user"}, "a message has no 'content'"),
        ("x", "a message must be a mapping"),
        ({"role": "user", "content": ["x"]}, "content part of type 'x'"),
        ({"role": "user", "content": [{"text": "x"}]}, "content part of type"),
        ({"role": "user", "content": [{"type": "video"}]}, "content part of type 'video'"),
        ({"role": "user", "content": [{"type": "image"}]}, "an image part carries no image"),
    ],
)
def test_malformed_messages(message, match, processor):
    with pytest.raises(DataError, match=match) as caught:
        processor.apply_chat_template([message], tokenize=True)
    assert len(str(caught.value)) <= 300


def test_a_file_url_names_a_file_of_this_machine(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(PNG)
    for host in ("", "localhost", "LocalHost"):
        assert load_image(f"file://{host}{path}").size == (90, 40)
    for url, match in {
        f"file://host{path}": "a file of the host 'host', which is not read; write file:///path",
        f"file://127.0.0.1:80{path}": "a file of the host '127.0.0.1:80'",
        "file://[/a": r"not a URL \(Invalid IPv6 URL\); write file:///path",
        "file://[::1]/a": r"a file of the host '\[::1\]'",
    }.items():
        for source in (url, {"url": url}):
            with pytest.raises(DataError, match=match):
                load_image(source)


@pytest.mark.parametrize("value", ["x", 0, -1, True, float("nan"), float("inf"), 1e30, [1]], ids=str)
@pytest.mark.parametrize("name", ["timeout", "max_pixels"])
def test_settings_of_reading_are_numbers(name, value):
    if name == "max_pixels" and value in (float("inf"), 1e30):  # no limit
        return
    with pytest.raises(
        ConfigError, match=f"{name}=.*, expected (seconds above 0, at most 86400|a number of at least 1)"
    ):
        load_image(PNG, **{name: value})
