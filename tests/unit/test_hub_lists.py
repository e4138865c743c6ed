"""DocDownstream and LLaVA-558K as the hub publishes them: the same shards as from this disk; and their errors."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare import llava, main
from datamodules.prepare.llava import LLaVAZip
from datamodules.shards.manifest import load_manifest
from datamodules.storage.stored_files import local_file
from tests.unit.hub_server import Hub, prepare, serving
from tests.unit.reading import read

pytest.importorskip("huggingface_hub")
LLAVA_LIST = "blip_laion_cc_sbu_558k.json"


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as server:
        yield server


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (60 + number, 50), os.urandom(3 * 50 * (60 + number))).save(buffer, "PNG")
    return buffer.getvalue()


def write_docdownstream(root: Path) -> None:
    """Eight questions about four pages of an archive in two pieces, and one about a page that is not there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"./imgs/{number}.png")
            data = png(number)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = buffer.getvalue()
    (root / "partial-imgs.00").write_bytes(whole[:20_000])
    (root / "partial-imgs.01").write_bytes(whole[20_000:])
    rows = [
        {
            "image": [f"./imgs/{number // 2}.png"],
            "messages": [
                {"role": "user", "content": f"<|image|>Question {number}?"},
                {"role": "assistant", "content": f"answer {number}"},
            ],
            "task_name": "qa_sft",
            "dataset_name": "DocVQA",
        }
        for number in range(9)
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "meta/DocVQA").mkdir(parents=True)
    (root / "meta/DocVQA/train.jsonl").write_text("{}\n")


def llava_row(number: int, image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": f"answer {number}"}]
    return {"id": f"{number:09d}", "image": image, "conversations": turns}


def write_llava(root: Path) -> None:
    """Records in another order than the zip's: five valid ones, and one for each kind of damage."""
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in reversed(range(5)):
            archive.writestr(f"00453/{number}.png", png(number))
        archive.writestr("../outside.png", png(8))
        archive.writestr("00453/damaged.png", png(9), zipfile.ZIP_STORED)
        place = archive.getinfo("00453/damaged.png").header_offset
        archive.writestr("00453/text.png", b"no picture")
    data = bytearray((root / "images.zip").read_bytes())
    data[place + 100] ^= 0xFF
    (root / "images.zip").write_bytes(data)
    names = [*(f"00453/{number}.png" for number in range(5)), "00453/none.png", "../outside.png"]
    names += ["00453/damaged.png", "00453/text.png"]
    rows: list[Any] = [llava_row(number, name) for number, name in enumerate(names)]
    (root / LLAVA_LIST).write_text(json.dumps([*rows, 7]))
    (root / "blip_laion_cc_sbu_558k_meta.json").write_text("[]")


WRITE = {"docdownstream": write_docdownstream, "llava": write_llava}
SKIPPED = {
    "docdownstream": {"missing_image": 1},
    "llava": {"bad_json": 1, "missing_image": 1, "undecodable_image": 2, "unsafe_path": 1},
}


@pytest.mark.parametrize("kind", ["docdownstream", "llava"])
def test_a_dataset_of_the_hub_gives_the_shards_of_a_folder(tmp_path, hub, kind):
    WRITE[kind](hub.root)
    hub.failing = 1
    done = prepare(hub, tmp_path / "out", kind=kind)
    assert done.returncode == 0, done.stderr
    assert hub.failing == 0
    assert main([kind, str(hub.root), str(tmp_path / "disk" / "out"), "--workers", "1"]) == 0
    manifest, local = (load_manifest(tmp_path / place) for place in ("out", "disk/out"))
    assert manifest.extra["skipped"] == local.extra["skipped"] == SKIPPED[kind]
    assert manifest.num_samples == {"docdownstream": 8, "llava": 5}[kind]
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in local.shards]
    # Nothing but the dataset is kept, and errors name the hub's file, not the copy that is gone.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "report.json", "out-00000.tar", "out-00000.index.safetensors"}
    problems = json.loads((tmp_path / "out/report.json").read_text())["problems"]
    listed = "train.jsonl" if kind == "docdownstream" else LLAVA_LIST
    assert all(f"hf://datasets/owner/set/{listed}, " in problem["message"] for problem in problems)
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in stored if path.stat().st_size > 10_000]


def test_a_short_piece_of_the_hub_is_named_with_its_byte(tmp_path, hub):
    write_docdownstream(hub.root)
    hub.lacking["partial-imgs.00"] = 5
    done = prepare(hub, tmp_path / "out", kind="docdownstream")
    assert done.returncode != 0
    expected = "hf://datasets/owner/set/partial-imgs.00 ends at byte 20000, expected 20005 bytes"
    assert expected in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    # The lines are there already, and the same command continues with the same work.
    hub.requested.clear()
    identity = (tmp_path / "out/.prepare/identity.json").read_text()
    again = prepare(hub, tmp_path / "out", kind="docdownstream")
    assert "thrown away" not in again.stderr
    assert (tmp_path / "out/.prepare/identity.json").read_text() == identity
    hub.lacking.clear()
    assert prepare(hub, tmp_path / "out", kind="docdownstream").returncode == 0
    assert not [path for path, _ in hub.requested if path.endswith("/train.jsonl")]


def test_a_list_of_this_disk_with_the_zip_of_the_hub(tmp_path, hub):
    write_llava(hub.root)
    (hub.root / LLAVA_LIST).rename(tmp_path / LLAVA_LIST)
    words = ("--image-root", "hf://datasets/owner/set/images.zip")
    done = prepare(hub, tmp_path / "out", *words, kind="llava", place=str(tmp_path / LLAVA_LIST))
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").num_samples == 5


@pytest.mark.parametrize("kind", ["docdownstream", "llava"])
def test_a_dataset_of_another_layout_says_what_it_holds(tmp_path, kind):
    root = tmp_path / "set"
    root.mkdir()
    (root / "README.md").write_text("about")
    (root / "other.json").write_text("[]")
    expected = {"docdownstream": r"train\.jsonl; expected train\.jsonl or val\.jsonl beside partial-imgs\.00",
                "llava": rf"{LLAVA_LIST}; expected parquet files, or {LLAVA_LIST} beside images\.zip"}  # fmt: skip
    with pytest.raises(DataError, match=rf"{expected[kind]}.*, found README\.md, other\.json; name the list"):
        main([kind, str(root), str(tmp_path / "out")])


def test_settings_that_do_not_go_together(tmp_path):
    write_docdownstream(tmp_path)
    write_llava(tmp_path)
    out, lines, listed = (str(tmp_path / name) for name in ("out", "train.jsonl", LLAVA_LIST))
    with pytest.raises(ConfigError, match=r"--file chooses a file of a folder or dataset"):
        main(["docdownstream", lines, out, "--file", "val.jsonl"])
    with pytest.raises(ConfigError, match=r"--file chooses a file of a folder or dataset"):
        main(["llava", listed, out, "--file", "a.json"])
    with pytest.raises(DataError, match=r"--archive .*meta: expected a piece, or partial-imgs\.00 .* found no files"):
        main(["docdownstream", lines, out, "--archive", str(tmp_path / "meta")])
    with pytest.raises(DataError, match=r"there is no .*none\.zip"):
        main(["llava", listed, out, "--image-root", str(tmp_path / "none.zip")])


def test_a_remote_list_without_its_zip_needs_image_root(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/lists/train.jsonl", b"{}\n")
    memory.pipe(f"/lists/{LLAVA_LIST}", b"[]")
    try:
        with pytest.raises(ConfigError, match=r"neither --archive nor --image-root says"):
            main(["docdownstream", "memory://lists/train.jsonl", str(tmp_path / "out")])
        with pytest.raises(ConfigError, match=r"no images\.zip is in its dataset; name its images"):
            main(["llava", "memory://lists", str(tmp_path / "out")])
        with pytest.raises(ConfigError, match=r"lists are fetched from http, https, s3, gs, hf only, found memory"):
            main(["llava", "memory://lists", str(tmp_path / "out"), "--image-root", str(tmp_path)])
    finally:
        memory.rm("/lists", recursive=True)


def test_a_finished_dataset_is_left_alone(tmp_path, hub):
    write_docdownstream(hub.root)
    assert prepare(hub, tmp_path / "out", kind="docdownstream").returncode == 0
    done = prepare(hub, tmp_path / "out", kind="docdownstream")
    assert "already holds a finished dataset" in " ".join(done.stderr.split())
    assert not (tmp_path / "out/.prepare").exists()


def test_other_lines_and_an_archive_that_lies_elsewhere(tmp_path, hub):
    write_docdownstream(hub.root)
    lines = (hub.root / "train.jsonl").read_text().splitlines(keepends=True)
    (hub.root / "val.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "some.jsonl").write_text("".join(lines[4:6]))
    assert prepare(hub, tmp_path / "val", "--file", "val.jsonl", kind="docdownstream").returncode == 0
    assert load_manifest(tmp_path / "val").num_samples == 3
    here = str(tmp_path / "some.jsonl")
    words = ("--archive", "owner/set")
    done = prepare(hub, tmp_path / "some", *words, kind="docdownstream", place=here)
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "some").num_samples == 2


@pytest.mark.parametrize("folder", ["images", "photos"])
def test_a_zip_of_one_folder(tmp_path, folder):
    """Its members may lie below a folder that is named as the zip is; of another layout it says what it holds."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(f"{folder}/00453/0.png", png(0))
    (tmp_path / LLAVA_LIST).write_text(json.dumps([llava_row(0, "00453/0.png")]))
    words = ["llava", str(tmp_path), str(tmp_path / "out"), "--workers", "1"]
    if folder == "images":
        assert main(words) == 0
        assert load_manifest(tmp_path / "out").num_samples == 1
        return
    message = (
        r"images\.zip holds none of the images of .*: expected such as '00453/0\.png', "
        r"found such as 'photos/00453/0\.png'"
    )
    with pytest.raises(DataError, match=message):
        main(words)


def test_a_list_of_a_zip_that_is_not_utf_8_is_named_with_its_byte(tmp_path):
    write_llava(tmp_path)
    path = tmp_path / LLAVA_LIST
    path.write_bytes(path.read_bytes().replace(b"answer 3", b"answer \xff"))
    with pytest.raises(DataError, match=rf"{LLAVA_LIST}: the record at byte \d+ is not JSON \(.*0xff"):
        main(["llava", str(tmp_path), str(tmp_path / "out"), "--workers", "1"])


def test_images_of_parquet_rows_lie_in_no_zip(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"images of parquet rows are read from a folder; unpack it"):
        main(["llava", str(tmp_path), str(tmp_path / "out"), "--image-root", "images.zip"])


def test_a_zip_is_read_by_several_processes_in_its_own_order(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_PART_RECORDS", 2)
    write_llava(tmp_path)
    raw = LLaVAZip(path=tmp_path / LLAVA_LIST, zip=local_file(tmp_path / "images.zip"))
    parts = raw.parts()
    numbers = [[row[0] for row in json.loads(str(part.payload[0]))] for part in parts]
    # What has no image there comes first, then the zip's members as they lie.
    assert numbers == [[5, 6], [9, 4], [3, 2], [1, 0], [7, 8]]
    for workers in ("1", "2"):
        main(["llava", str(tmp_path), str(tmp_path / workers / "out"), "--workers", workers])
    one, two = (load_manifest(tmp_path / workers / "out").shards for workers in ("1", "2"))
    assert [shard.sha256 for shard in one] == [shard.sha256 for shard in two]


def test_a_zip_whose_list_has_unsafe_paths_alone_counts_them(tmp_path):
    turns = [{"from": "human", "value": "<image>\nTotal?"}, {"from": "gpt", "value": "5"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "image": "../x.png", "conversations": turns}]))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
        zipped.writestr("a.png", b"x")
    data = LLaVAZip(path=tmp_path / "a.json", zip=local_file(tmp_path / "images.zip"))
    assert read(data)[1] == {"unsafe_path": 1}
