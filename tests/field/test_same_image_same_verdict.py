"""An image has the same verdict in every converter: its content decides, not the ending of its name or its spelling.

Sources: huggingface/datasets#4514, haotian-liu/LLaVA#593, pytorch/vision#446 (endings); vimiv#66, ranger PR#1703 (names
that are no UTF-8); composed and decomposed accents of macOS.
"""

import io
import json
import logging
import os
import tarfile
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from datamodules.prepare.index import index_shards
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_answers
from datamodules.shards.sample import SampleError
from datamodules.storage.stored_files import list_files
from tests.unit.reading import command

cc12m, docdownstream, folder, jsonl, llava = map(command, ("cc12m", "docdownstream", "folder", "jsonl", "llava"))
benchmark, sroie = map(command, ("benchmark", "sroie"))


def encoded(kind, shade=0, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 90, 200)).save(buffer, kind, **options)
    return buffer.getvalue()


PAGES = [Image.new("RGB", (9, 7), shade) for shade in ("navy", "red")]
FILES = {
    "a.tif": encoded("TIFF", 1),
    "b.gif": encoded("GIF", 2),
    "c.bmp": encoded("BMP", 3),
    "no_ending": encoded("PNG", 4),
    "e.JPG": encoded("JPEG", 5),
    "f.jfif": encoded("JPEG", 6),
    "g.png": encoded("WEBP", 7),
    "pages.TIFF": encoded("TIFF", 8, save_all=True, append_images=PAGES),
    "h.dat": encoded("JPEG2000", 9),
    "damaged.png": encoded("PNG")[:50],
    "text.png": b"no image",
}


def run(converter, path, out, *more):
    assert converter([str(path), str(out), "--workers", "1", *map(str, more)]) == 0
    report = json.loads((out / "report.json").read_text())
    return report["written"], report["skipped"]


def test_every_converter_judges_by_content(tmp_path, caplog):
    images = tmp_path / "images"
    images.mkdir()
    for name, data in FILES.items():
        (images / name).write_bytes(data)
        (images / name).with_suffix(".txt").write_text(f"text of {name}")
    (images / "._a.tif").write_bytes(b"\0\5\x16\7")
    (images / "._a.txt").write_bytes(b"\0\5\x16\7")
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": name, "image": name, "conversations": turns} for name in FILES]
    (images / "list.json").write_text(json.dumps(records))
    lines = [
        {"image": name, "messages": [{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": "y"}]}
        for name in FILES
    ]
    (images / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = (len(FILES) - 2, {"undecodable_image": 2})
    with caplog.at_level(logging.WARNING):
        assert run(folder, images, tmp_path / "folder") == expected
    assert "pages.TIFF: a TIFF of several pages, of which only the first is used" in caplog.text
    assert run(jsonl, images / "lines.jsonl", tmp_path / "jsonl") == expected
    assert run(llava, images / "list.json", tmp_path / "llava") == expected


def test_letter_case_of_endings_does_not_matter(tmp_path):
    cases = [("JPG", "TXT"), ("jpg", "Txt"), ("Png", "txt"), ("png", "JSON"), ("JPG", "tXt"), ("PNG", "jSON")]
    for number, (image, text) in enumerate(cases):
        (tmp_path / f"IMG_{number}.{image}").write_bytes(encoded("PNG", number))
        content = json.dumps({"question": "?", "answer": "a"}) if text.lower() == "json" else "text"
        (tmp_path / f"IMG_{number}.{text}").write_text(content)
    (tmp_path / "b.png").write_bytes(encoded("PNG", 9))
    (tmp_path / "b.png.txt").write_text("text")
    for image, text in (("d.png", "d.PNG.TXT"), ("é.PNG", normalize("NFD", "é.png.Txt")), ("X.png", "x.txt")):
        (tmp_path / image).write_bytes(encoded("PNG", 100 + ord(image[0]) % 100))
        (tmp_path / text).write_text("text")
    assert run(folder, tmp_path, tmp_path / "out") == (9, {"missing_text": 1})
    (tmp_path / "0.TAR").touch()
    assert [file.name for file in list_files(str(tmp_path), ".tar")][:1] == ["0.TAR"]


@pytest.mark.parametrize("image", ["a.JPG", "a.jpeg", "a.png", "a.Jpg", "a.TIF"])
@pytest.mark.parametrize("note", ["a.json", "a.JSON", "a.jSon"])
def test_receipts_have_any_ending_of_images(tmp_path, image, note):
    (tmp_path / image).write_bytes(encoded("PNG"))
    line = {"quad": [0, 0, 8, 0, 8, 6, 0, 6], "text": "b"}
    (tmp_path / note).write_text(json.dumps({"fields": {"a": "b"}, "lines": [line]}))
    assert sroie([str(tmp_path), str(tmp_path / "out")]) == 0
    assert load_manifest(tmp_path / "out/heldout").num_samples == 1
    assert load_manifest(tmp_path / "out/lines").num_samples == 1


@pytest.mark.parametrize("text", [b"text", b""])
def test_names_that_are_no_utf8_are_spelled_out(tmp_path, text):
    images = tmp_path / "images"
    images.mkdir()
    (images / "ok.png").write_bytes(encoded("PNG"))
    (images / "ok.txt").write_text("text")
    odd = os.fsencode(images) + b"/caf\xe9"
    try:
        open(odd + b".png", "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open(odd + b".png", "wb") as stream:
        stream.write(encoded("PNG", 200))
    with open(odd + b".txt", "wb") as stream:
        stream.write(text)
    expected = (2, {}) if text else (1, {"empty_answer": 1})
    assert run(folder, images, tmp_path / "out") == expected
    manifest = load_manifest(tmp_path / "out")
    assert len(read_answers(manifest.folder)) == expected[0]
    ids = (tmp_path / "out" / manifest.shards[0].path).read_bytes()
    assert (rb"images/caf\\xe9" in ids) == bool(text)


CONVERTERS = {jsonl: "lines.jsonl", docdownstream: "lines.jsonl", llava: "list.json", folder: "", cc12m: "0.tar"}


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("converter", [*CONVERTERS, index_shards, benchmark, sroie])
def test_folders_and_lists_may_have_such_names(tmp_path, converter, place):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + (b"/caf\xe9" if place == "folder" else b"/in")))
    odd = os.fsdecode(b"\xe9") if place == "file" else ""
    try:
        root.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (root / f"{odd}a.png").write_bytes(encoded("PNG"))
    (root / f"{odd}a.txt").write_text("text")
    line = {"quad": [0, 0, 8, 0, 8, 6, 0, 6], "text": "b"}
    note = {"question": "?", "answer": "y", "fields": {"a": "b"}, "lines": [line]}
    (root / f"{odd}a.json").write_text(json.dumps(note))
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "y"}]
    records = [{"image": f"{odd}a.png" if name else name, "messages": turns, "references": ["y"]} for name in ("a", "")]
    (root / f"{odd}lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    (root / f"{odd}list.json").write_text(json.dumps(records))
    with tarfile.open(root / f"{odd}0.tar", "w") as tar:
        tar.add(root / f"{odd}a.png", "a.png")
        tar.add(root / f"{odd}a.txt", "a.txt")
    if converter is index_shards:
        (found,) = [load_manifest(index_shards(root).folder)]
        assert (found.name == r"caf\xe9") == (place == "folder")
    elif converter is benchmark:
        assert benchmark(["wtq", str(root / f"{odd}lines.jsonl"), str(tmp_path / "out")]) == 0
        json.dumps(load_manifest(tmp_path / "out").extra, ensure_ascii=False).encode()
    elif converter is sroie:
        assert sroie([str(root), str(tmp_path / "out")]) == 0
    else:
        given = root / (odd + CONVERTERS[converter]) if CONVERTERS[converter] else root
        assert run(converter, given, tmp_path / "out")[0] == 1
        json.dumps(load_manifest(tmp_path / "out").extra, ensure_ascii=False).encode()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_names_are_the_same(tmp_path, form):
    name, other = (normalize(each, "résumé.png") for each in (form, "NFD" if form == "NFC" else "NFC"))
    (tmp_path / name).write_bytes(encoded("PNG"))
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"images": [other], "messages": turns}))
    assert run(jsonl, tmp_path / "lines.jsonl", tmp_path / "jsonl") == (1, {})
    (tmp_path / other).with_suffix(".txt").write_text("text")
    assert run(folder, tmp_path, tmp_path / "folder") == (1, {})


def test_a_message_about_such_a_name_can_be_written_anywhere():
    error = SampleError("caf\udce9.png: no image")
    assert str(error) == r"caf\udce9.png: no image"
    assert f"{error}".encode()
