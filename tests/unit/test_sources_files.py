"""Sources of plain files (caption tars, images with texts beside them, LLaVA's list): valid rows and invalid ones."""

import io
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare.cc12m import CaptionTars
from datamodules.prepare.folder import SidecarFolder
from datamodules.prepare.llava import LLaVAList
from datamodules.prepare.sources.images import safe_path
from datamodules.prepare.sources.json_files import raw_elements
from datamodules.shards.sample import SampleError
from datamodules.storage.stored_files import StoredFile, list_files
from tests.unit.reading import read, texts
from tests.unit.tar_files import write_tar


def image_file(width: int = 4, ending: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), (width, 0, 0)).save(buffer, ending)
    return buffer.getvalue()


# Caption tars


def pair(key: str, caption: str = "two people", ending: str = "jpg", **note: Any) -> dict[str, bytes]:
    note = {"url": f"https://example.org/{key}", "caption": caption, "key": key, "status": "success"} | note
    data = image_file(5, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[ending])
    return {f"{key}.{ending}": data, f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(note).encode()}


def tars(folder: Path, prompt: str = "Describe.") -> CaptionTars:
    return CaptionTars(files=tuple(list_files(str(folder), ".tar")), fetched=folder, prompt=prompt)


def test_caption_pairs_of_several_runs(tmp_path):
    write_tar(tmp_path / "cc12m-train-0000.tar", (pair("000000001") | pair("000000003", "à la plage", "webp")).items())
    # Keys begin anew in another run, and what looks like a path is a name only.
    write_tar(tmp_path / "other-0000.tar", (pair("000000001", "b", "png") | pair("../../up/000000002")).items())
    samples, bad = read(tars(tmp_path))
    assert not bad
    assert [sample.record["id"] for sample in samples] == [
        "cc12m/cc12m-train-0000/000000001",
        "cc12m/cc12m-train-0000/000000003",
        "cc12m/other-0000/000000001",
        "cc12m/other-0000/../../up/000000002",
    ]
    assert [sample.images[0][1] for sample in samples] == ["jpg", "webp", "png", "jpg"]
    assert texts(samples[1]) == ["Describe.", "à la plage"]
    assert samples[0].record["meta"] == {"url": "https://example.org/000000001"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc12m-train-0000.tar", "other-0000.tar"]


def test_tars_of_one_name_have_ids_of_their_own(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        write_tar(tmp_path / run / "00000.tar", pair("000000001", run).items())
    samples, _ = read(tars(tmp_path))
    assert [texts(sample)[1] for sample in samples] == ["one", "two"]
    ids = [sample.record["id"].removeprefix(f"cc12m/{tmp_path}") for sample in samples]
    assert ids == ["/one/00000/000000001", "/two/00000/000000001"]


def test_a_store_that_tars_are_not_fetched_from(tmp_path):
    file = StoredFile(url="memory://set/a.tar", path="memory://set/a.tar", size=10240)
    with pytest.raises(
        ConfigError, match=r"memory://set/a\.tar: files are fetched from http, .* only, found memory://"
    ):
        list(CaptionTars(files=(file,), fetched=tmp_path, prompt="").rows((file, "a")))


def test_invalid_caption_pairs_are_counted_by_reason(tmp_path):
    members = (
        pair("1")
        | {name: data for name, data in pair("2").items() if not name.endswith("jpg")}
        | pair("3", "  ")
        | {name: data[:60] if name.endswith("jpg") else data for name, data in pair("4").items()}
        | {name: b"{" if name.endswith("json") else data for name, data in pair("5").items()}
        | {"6.jpg": image_file(5, "JPEG")}
    )
    write_tar(tmp_path / "a.tar", members.items())
    samples, bad = read(tars(tmp_path))
    assert len(samples) == 1
    assert bad == {"missing_image": 1, "empty_caption": 2, "undecodable_image": 1, "bad_json": 1}


def test_a_damaged_tar_names_shard_and_byte(tmp_path):
    path = write_tar(tmp_path / "a.tar", (pair("1") | pair("2")).items())
    data = bytearray(path.read_bytes())
    at = data.index(b"2.jpg\0")
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.tar at byte {at}, member 1\.json: broken header.*fetch the tar"):
        list(tars(tmp_path).rows(tars(tmp_path).parts()[0]))


# Images with texts beside them


def beside(root: Path, name: str, note: Any = None, text: str | None = None) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_file())
    if note is not None:
        path.with_suffix(".json").write_text(note if isinstance(note, str) else json.dumps(note))
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def folder(root: Path) -> SidecarFolder:
    return SidecarFolder(root=root, prompt="Read all text.", name="mine", source="mine")


def test_texts_beside_images(tmp_path):
    plain = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Hale"}]
    marked = [{"role": "user", "content": "Who?<|image|>"}, {"role": "assistant", "content": "Hale"}]
    normal = [
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image", "index": 0}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hale"}]},
    ]
    beside(tmp_path, "b/a.png", text=" TOTAL 12.50\n")
    beside(tmp_path, "b.jpg", {"question": "Total?", "answer": "12.50"})
    beside(tmp_path, "c.png", {"qa": [{"question": q, "answer": q.lower()} for q in "AB"]})
    beside(tmp_path, "d.png", {"messages": plain})
    beside(tmp_path, "e.png", {"messages": marked})
    beside(tmp_path, "f.png", {"messages": normal})
    beside(tmp_path, "g.png", {"url": "https://example.org", "key": "1"}, text="the json is a download's")
    samples, bad = read(folder(tmp_path))
    assert not bad
    found = {sample.record["id"].removeprefix("mine/"): sample for sample in samples}
    assert list(found) == ["b", "c", "d", "e", "f", "g", "b/a"]
    assert texts(found["b/a"]) == ["Read all text.", "TOTAL 12.50"]
    assert texts(found["b"]) == ["Total?", "12.50"]
    assert texts(found["c"]) == ["A", "a", "B", "b"]
    kinds = {name: [part["type"] for part in found[name].record["messages"][0]["content"]] for name in "def"}
    assert kinds == {"d": ["image", "text"], "e": ["text", "image"], "f": ["text", "image"]}
    assert texts(found["g"]) == ["Read all text.", "the json is a download's"]
    assert found["b"].images == [((tmp_path / "b.jpg").read_bytes(), "png")]  # the ending is what the file is


def test_invalid_images_of_a_folder_are_counted_by_reason(tmp_path):
    twice = [{"role": "user", "content": "<|image|><|image|>"}, {"role": "assistant", "content": "x"}]
    beside(tmp_path, "good.png", text="x")
    beside(tmp_path, "alone1.png")
    beside(tmp_path, "alone2.png")
    beside(tmp_path, "empty.png", text="\n")
    beside(tmp_path, "broken.png", note="{")
    beside(tmp_path, "other.png", {"label": 3})
    beside(tmp_path, "list.png", [1])
    beside(tmp_path, "none.png", {"qa": []})
    beside(tmp_path, "number.png", {"question": "How many?", "answer": 3})
    beside(tmp_path, "twice.png", {"messages": twice})
    beside(tmp_path, "cut.png", text="x")
    (tmp_path / "cut.png").write_bytes(image_file()[:40])
    beside(tmp_path, "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    samples, bad = read(folder(tmp_path))
    assert len(samples) == 1
    assert bad == {
        "missing_text": 2,
        "empty_answer": 1,
        "bad_json": 1,
        "bad_sidecar": 5,
        "placeholder_count": 1,
        "undecodable_image": 1,
    }


def test_images_and_texts_are_the_inputs(tmp_path):
    """What makes an interrupted packing begin anew: these files have changed."""
    beside(tmp_path, "a.png", text="x")
    beside(tmp_path, "b.png", {"question": "q", "answer": "a"})
    assert [path.name for path in folder(tmp_path).inputs()] == ["a.png", "a.txt", "b.png", "b.json"]


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        folder(tmp_path).num_rows()
    with pytest.raises(DataError, match=r"there is no folder of images .*none"):
        folder(tmp_path / "none").num_rows()


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "a\0.png", "..\\a.png", "C:/a.png"])
def test_paths_stay_below_their_folder(name):
    with pytest.raises(SampleError, match=r"is not one below its folder|is absolute; expected one relative") as caught:
        safe_path(name, where="row 1")
    assert caught.value.reason == "unsafe_path"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_path_names_no_image(name):
    with pytest.raises(SampleError, match="the path of an image is empty") as caught:
        safe_path(name, where="row 1")
    assert caught.value.reason == "missing_image"


# LLaVA's list


def llava(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{number:09d}",
        "image": f"00453/{number}.png",
        "conversations": [
            {"from": "human", "value": "Render a clear summary of the photo.\n<image>"},
            {"from": "gpt", "value": f"a wooden bench – number {number}"},
        ],
    } | changes


def llava_list(root: Path, rows: list[Any], **options: Any) -> LLaVAList:
    (root / "images/00453").mkdir(parents=True, exist_ok=True)
    for number in range(len(rows)):
        (root / f"images/00453/{number}.png").write_bytes(image_file(number + 2))
    (root / "list.json").write_text(json.dumps(rows, ensure_ascii=False, **options), encoding="utf-8")
    return LLaVAList(path=root / "list.json", image_root=root / "images")


def test_a_list_of_conversations(tmp_path):
    text_only = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]
    rows = [llava(0), {"id": "t", "conversations": text_only}, llava(2)]
    samples, bad = read(llava_list(tmp_path, rows))
    assert not bad
    assert [len(sample.images) for sample in samples] == [1, 0, 1]
    assert texts(samples[2]) == ["Render a clear summary of the photo.", "a wooden bench – number 2"]
    assert samples[2].record["messages"][0]["content"][1] == {"type": "image", "index": 0}
    assert [sample.record["id"] for sample in samples] == ["llava/000000000", "llava/t", "llava/000000002"]
    assert samples[2].images == [((tmp_path / "images/00453/2.png").read_bytes(), "png")]


def test_invalid_records_of_a_list_are_counted_by_reason(tmp_path):
    rows = [
        llava(0),
        7,
        llava(2, image={"file": "a.png"}),
        llava(3, image="00453/none.png"),
        llava(4, image="../list.json"),
        llava(5, image=["00453/1.png", "00453/2.png"]),
        llava(6, conversations="text"),
        llava(7, conversations=[{"from": "human", "value": "<image>?"}]),
    ]
    samples, bad = read(llava_list(tmp_path, rows))
    assert len(samples) == 1
    assert bad == {
        "bad_json": 1,
        "bad_row": 1,
        "missing_image": 1,
        "unsafe_path": 1,
        "placeholder_count": 1,
        "bad_conversation": 1,
        "empty_answer": 1,
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_cut_at_its_elements(tmp_path, indent):
    rows = [{"a": 'x]},"\\'}, [1, [2]], "é{", 12345, -1.5e3, None, {}, "漢字"]
    path = tmp_path / "a.json"
    for number in range(len(rows) + 1):
        path.write_text(json.dumps(rows[:number], ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
        found = list(raw_elements(path))
        assert [(place, json.loads(text)) for place, text in found] == list(enumerate(rows[:number]))


def test_a_list_is_read_where_json_reads_it_and_refused_where_not(tmp_path):
    """A character removed, added or changed is damage that is named, or another list."""
    path, read = tmp_path / "a.json", Counter[bool]()
    whole = json.dumps([{"a": 'x]},"\\', "b": [1, {}]}, "é{", -1.5e3, None, [[2]], {}], ensure_ascii=False)
    ends = [(place, place + size) for place in range(len(whole)) for size in (0, 1)]
    for (start, stop), text in product(ends, ["", *'[]{},":\\ 1a']):
        changed = whole[:start] + text + whole[stop:]
        path.write_text(changed, encoding="utf-8")
        try:
            expected = json.loads(changed)
        except ValueError:
            expected = None
        if isinstance(expected, list):
            assert [json.loads(element) for _, element in raw_elements(path)] == expected
        else:
            with pytest.raises(DataError):
                list(raw_elements(path))
        read[isinstance(expected, list)] += 1
    assert read[True] > 100 and read[False] > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', r"begins with an object, expected one JSON list .*jq -s \. a\.json"),
        ("7", "byte 0: it holds no JSON list, found '7'"),
        ('[{"id": 1}]\n[{"id": 2}]\n', "byte 12: the list ends before this byte"),
        ('[] {"id": 2}', "byte 3: the list ends before this byte"),
        ("[1], 2", "byte 3: the list ends before this byte, but the file continues with ', 2'"),
        ("[1]]", "byte 3: the list ends before this byte"),
        ("[1]\n\0\0", "byte 4: the list ends before this byte"),
        ("", "byte 0: it holds no JSON list, found the end of the file"),
        ('[{"id": 1}, {"id": ', "the file ends inside the list, in the record at byte 11"),
        ('[{"id": 1}', "the file ends inside the list, in the record at byte 1"),
        ("[1, 25", "the file ends inside the list, in the record at byte 3"),
        ('[{"id": "1, 25]', "the file ends inside the list, in the record at byte 1"),
        ('[{"id": 1} {"id": 2}]', "the record at byte 1 is not JSON"),
        ('[{"id": 1}, oops]', "the record at byte 12 is not JSON"),
        ("[1,]", "the record at byte 3 is not JSON"),
        ("[,1]", "the record at byte 1 is not JSON"),
        ("[1, {]}", "byte 6: expected a comma or the end of the list, found '}'"),
        ("[}", "byte 1: expected a comma or the end of the list, found '}'"),
        ('[{"a": 1}}', "byte 9: expected a comma or the end of the list, found '}'"),
    ],
)
def test_what_is_no_list_names_the_byte(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(raw_elements(tmp_path / "a.json"))
