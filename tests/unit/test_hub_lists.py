"""Lists of DocDownstream and LLaVA-558K as the hub publishes them, with images unpacked here; their errors."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare import main
from datamodules.prepare.input_files import fetched_list
from datamodules.prepare.pack.options import PackOptions
from datamodules.shards.manifest import load_manifest
from datamodules.storage.stored_files import StoredFile
from tests.unit.hub_server import Hub, prepare, serving
from tests.unit.parquet_files import write
from tests.unit.tar_files import write_tar

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


def write_images(folder: Path, images: dict[str, bytes]) -> None:
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_docdownstream(root: Path) -> None:
    """Eight questions about four pages of an archive in two pieces, and one about a page that is not there."""
    write_images(root.parent / "images", {f"imgs/{number}.png": png(number) for number in range(4)})
    for name in ("partial-imgs.00", "partial-imgs.01"):
        (root / name).write_bytes(b"a piece of the archive")
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
    """Five valid records, and one for each kind of damage."""
    images = {f"00453/{number}.png": png(number) for number in range(5)} | {"00453/text.png": b"no picture"}
    write_images(root.parent / "images", images)
    (root / "images.zip").write_bytes(b"PK\x03\x04")
    names = [*(f"00453/{number}.png" for number in range(5)), "00453/none.png", "../outside.png", "00453/text.png"]
    rows: list[Any] = [llava_row(number, name) for number, name in enumerate(names)]
    (root / LLAVA_LIST).write_text(json.dumps([*rows, 7]))
    (root / "blip_laion_cc_sbu_558k_meta.json").write_text("[]")


WRITE = {"docdownstream": write_docdownstream, "llava": write_llava}
SKIPPED = {
    "docdownstream": {"missing_image": 1},
    "llava": {"bad_json": 1, "missing_image": 1, "undecodable_image": 1, "unsafe_path": 1},
}


@pytest.mark.parametrize("kind", ["docdownstream", "llava"])
def test_a_list_of_the_hub_gives_the_shards_of_a_list_of_this_disk(tmp_path, hub, kind):
    WRITE[kind](hub.root)
    hub.failing = 1
    words = ("--image-root", str(tmp_path / "images"))
    done = prepare(hub, tmp_path / "out", *words, kind=kind)
    assert done.returncode == 0, done.stderr
    assert hub.failing == 0
    assert main([kind, str(hub.root), str(tmp_path / "disk" / "out"), "--workers", "1", *words]) == 0
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


@pytest.mark.parametrize("kind", ["cc12m", "vcr"])
def test_files_of_the_hub_give_the_shards_of_files_of_this_disk(tmp_path, hub, kind):
    for number in range(2):
        if kind == "cc12m":
            members = {
                f"{number}{key}.{ending}": data
                for key in range(3)
                for ending, data in (("png", png(key)), ("txt", b"a"))
            }
            write_tar(hub.root / f"{number}.tar", members.items())
        else:
            row = {"question_id": number, "crossed_text": ["a"], "stacked_image": {"bytes": png(number), "path": None}}
            write(hub.root / f"train-{number}.parquet", [row])
    done = prepare(hub, tmp_path / "out", kind=kind)
    assert done.returncode == 0, done.stderr
    assert main([kind, str(hub.root), str(tmp_path / "disk" / "out"), "--workers", "1"]) == 0
    manifest, local = (load_manifest(tmp_path / place) for place in ("out", "disk/out"))
    assert manifest.num_samples == {"cc12m": 6, "vcr": 2}[kind]
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in local.shards]
    assert not (tmp_path / "out/.prepare").exists()


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("docdownstream", r"cat partial-imgs\.\* \| tar -xz -C FOLDER"), ("llava", r"unzip images\.zip -d FOLDER")],
)
def test_images_that_are_still_packed_are_answered_with_the_command(tmp_path, kind, advice):
    import fsspec

    (tmp_path / "set").mkdir()
    WRITE[kind](tmp_path / "set")
    with pytest.raises(ConfigError, match=rf"fetch and unpack .*\(`{advice}`\), and name the folder with --image-root"):
        main([kind, str(tmp_path / "set"), str(tmp_path / "out")])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/lists", recursive=True)
    try:
        with pytest.raises(ConfigError, match=advice):  # the list alone, without what lies beside it
            main([kind, f"memory://lists/{next((tmp_path / 'set').glob('*.json*')).name}", str(tmp_path / "out")])
    finally:
        memory.rm("/lists", recursive=True)


@pytest.mark.parametrize("kind", ["docdownstream", "llava"])
def test_an_archive_in_place_of_the_folder_of_images(tmp_path, kind):
    WRITE[kind](tmp_path)
    packed = next(tmp_path.glob("partial-imgs.00" if kind == "docdownstream" else "images.zip"))
    with pytest.raises(ConfigError, match=rf"{packed.name}: expected a folder, found a file; unpack it \(`"):
        main([kind, str(tmp_path), str(tmp_path / "out"), "--image-root", str(packed)])
    with pytest.raises(ConfigError, match=r"none: expected a folder, found nothing; check the path"):
        main([kind, str(tmp_path), str(tmp_path / "out"), "--image-root", str(tmp_path / "none")])


def test_images_of_parquet_rows_lie_in_a_folder_too(tmp_path):
    for name in ("train.parquet", "images.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"images\.zip: expected a folder, found a file; unpack it \(`unzip"):
        main(["llava", str(tmp_path), str(tmp_path / "out"), "--image-root", str(tmp_path / "images.zip")])


def test_a_list_is_fetched_once_for_a_run_and_its_resume(tmp_path, hub):
    (hub.root / "train.jsonl").write_text("{}\n")
    url = f"http://127.0.0.1:{hub.server_port}/datasets/owner/set/resolve/main/train.jsonl"
    file, options = StoredFile(url=url, path=url, size=3), PackOptions(out=tmp_path / "out")
    assert [fetched_list(file, options).read_text() for _ in range(2)] == ["{}\n"] * 2
    assert len(hub.requested) == 1
    (hub.root / "train.jsonl").write_text("{}\n{}\n")  # published anew
    assert fetched_list(replace(file, size=6), options).read_text() == "{}\n{}\n"


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


def test_a_list_of_a_store_that_lists_are_not_fetched_from(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(f"/lists/{LLAVA_LIST}", b"[]")
    try:
        with pytest.raises(ConfigError, match=r"files are fetched from http, https, s3, gs, hf only, found memory"):
            main(["llava", "memory://lists", str(tmp_path / "out"), "--image-root", str(tmp_path)])
    finally:
        memory.rm("/lists", recursive=True)


def test_a_finished_dataset_is_left_alone(tmp_path, hub):
    write_docdownstream(hub.root)
    words = ("--image-root", str(tmp_path / "images"))
    assert prepare(hub, tmp_path / "out", *words, kind="docdownstream").returncode == 0
    done = prepare(hub, tmp_path / "out", *words, kind="docdownstream")
    assert "already holds a finished dataset" in " ".join(done.stderr.split())
    assert not (tmp_path / "out/.prepare").exists()


def test_other_lines_of_a_dataset(tmp_path, hub):
    write_docdownstream(hub.root)
    lines = (hub.root / "train.jsonl").read_text().splitlines(keepends=True)
    (hub.root / "val.jsonl").write_text("".join(lines[:3]))
    words = ("--file", "val.jsonl", "--image-root", str(tmp_path / "images"))
    assert prepare(hub, tmp_path / "val", *words, kind="docdownstream").returncode == 0
    assert load_manifest(tmp_path / "val").num_samples == 3


def test_a_list_that_is_not_utf_8_is_named_with_its_byte(tmp_path):
    (tmp_path / "set").mkdir()
    write_llava(tmp_path / "set")
    path = tmp_path / "set" / LLAVA_LIST
    path.write_bytes(path.read_bytes().replace(b"answer 3", b"answer \xff"))
    words = ("--workers", "1", "--image-root", str(tmp_path / "images"))
    with pytest.raises(DataError, match=rf"{LLAVA_LIST}: the record at byte \d+ is not JSON \(.*0xff"):
        main(["llava", str(path), str(tmp_path / "out"), *words])
