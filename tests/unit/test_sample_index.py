"""The index beside a shard: offsets and sizes, equal bytes, and an error for each kind of damage."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignvlm_pl.errors import DataError
from datamodules.prepare import main
from datamodules.prepare.index import index_shards
from datamodules.shards.index import IndexRow, SampleIndex, index_path, load_index, write_index
from datamodules.shards.manifest import load_manifest, read_manifest
from datamodules.shards.shard_file import upright_size
from datamodules.shards.verify import Verification
from datamodules.shards.writer import ShardWriter


def image_file(size: tuple[int, int], orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def record(question: str, answer: str, images: int) -> dict[str, Any]:
    parts = [{"type": "image", "index": index} for index in range(images)]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}] if answer else []},
        ]
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0", samples_per_shard=3) as out:
        out.add(record("où?", "là", 2), [image_file((30, 20)), image_file((40, 10), orientation=6)], ["jpg"] * 2)
        out.add(record("a", "", 0) | {"source": "other"}, [], [])
        out.add(record("b" * 2000, "cd", 1), [image_file((5, 6))], ["jpg"])
        out.add(record("last", "one", 0), [], [])
    return tmp_path / "set"


def indexes(folder: Path) -> list[SampleIndex]:
    manifest = load_manifest(folder)
    return [load_index(manifest, shard) for shard in manifest.shards]


def test_the_columns_are_what_the_shard_holds(folder):
    first, second = indexes(folder)
    assert [row.key for row in first] == ["set-00000000", "set-00000001", "set-00000002"]
    assert [row.sizes for row in first] == [((30, 20), (10, 40)), (), ((5, 6),)]
    assert [row.text_bytes for row in first] == [len("où?là".encode()), 1, 2002]
    assert [row.supervised_bytes for row in first] == [3, 0, 2]
    assert [row.source for row in first] == ["made", "other", "made"]
    with tarfile.open(folder / "set-00000.tar") as tar:
        members = tar.getmembers()
        starts = [m.offset for m in members if m.name.endswith(".json")]
        assert [*(row.offset for row in first), first.end] == [*starts, tar.offset]
        assert [first.extent(number) for number in range(3)] == [*pairwise([*starts, tar.offset])]
    assert second[0].offset == 0
    digests = [hashlib.sha256(index_path(folder / f"set-0000{i}.tar").read_bytes()).hexdigest() for i in (0, 1)]
    assert [shard.index_sha256 for shard in load_manifest(folder).shards] == digests


def test_a_sample_is_read_from_its_place_alone(folder):
    index = indexes(folder)[0]
    data = (folder / "set-00000.tar").read_bytes()
    for number, row in enumerate(index):
        start, stop = index.extent(number)
        piece = data[start:stop]
        with tarfile.open(fileobj=io.BytesIO(piece + bytes(1024))) as tar:
            assert {name.split(".")[0] for name in tar.getnames()} == {row.key}


def test_indexing_again_gives_the_same_bytes_and_keeps_the_manifest(folder):
    path = folder / "manifest.json"
    before = json.loads(path.read_text())
    files = {file.name: file.read_bytes() for file in folder.glob("*.index.safetensors")}
    old = before | {"seed": 5, "shards": [dict(shard) for shard in before["shards"]]}
    for shard in old["shards"]:
        del shard["index_sha256"]
    path.write_text(json.dumps(old))
    for file in folder.glob("*.index.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match=r"no sample index .*set-00000\.index\.safetensors.*prepare index FOLDER"):
        indexes(folder)
    assert [damage.kind for damage in Verification()(folder)] == ["missing_index"] * 2
    assert main(["index", str(folder), "--workers", "2"]) == 0
    assert {file.name: file.read_bytes() for file in folder.glob("*.index.safetensors")} == files
    assert json.loads(path.read_text()) == before | {"seed": 5}
    assert list(Verification()(folder)) == []


def test_shards_made_elsewhere_are_indexed_whatever_their_format(tmp_path):
    long = "d" * 120
    row = {"sample_id": "a", "query": "Rows?", "annotations": "three", "dataset_name": "tables"}
    turns = [{"role": "user", "content": "<|image|>Total?"}, {"role": "assistant", "content": "12"}]
    samples = {
        "000": {"jpg": image_file((7, 8)), "txt": b" a wall ", "json": b'{"caption": "a wall", "key": "000"}'},
        f"{long}/001": {"jpg": image_file((9, 8), orientation=8), "txt": b"long"},
        "002": {"json": json.dumps(row).encode(), "png": image_file((3, 4))},
        "003": {
            "json": json.dumps({"messages": turns, "dataset_name": "DocVQA"}).encode(),
            "0.jpg": image_file((1, 2)),
        },
        "004": {"json": json.dumps(record("x", "yz", 0)).encode()},
        "005": {"jpg": b"no picture", "txt": b"a caption"},
    }
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(form)
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w", format=form) as tar:
            for key, members in samples.items():
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        manifest = index_shards(folder, source="web")
        assert manifest.extra == {"unreadable": {"undecodable_image": 1}}
        index = load_index(manifest, manifest.shards[0])
        assert [row.key for row in index] == list(samples)
        assert [row.sizes for row in index] == [((7, 8),), ((8, 9),), ((3, 4),), ((1, 2),), (), ()]
        assert [row.text_bytes for row in index] == [6, 4, 10, 8, 3, 0]
        assert [row.supervised_bytes for row in index] == [6, 4, 5, 2, 2, 0]
        assert [row.source for row in index] == ["web", "web", "tables", "DocVQA", "web", "web"]
        # A header that only carries the long name belongs to its sample.
        with tarfile.open(folder / "0.tar") as tar:
            assert index[1].offset < next(m.offset_data for m in tar if m.name.startswith(long)) - 512
        data = (folder / "0.tar").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data[slice(*index.extent(1))] + bytes(1024))) as tar:
            assert tar.getnames() == [f"{long}/001.jpg", f"{long}/001.txt"]


def test_another_format_than_the_named_one_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("0.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match=r"no column sample_id.*--format"):
        index_shards(tmp_path, format="bigdocs")


def shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_member_that_comes_twice_is_refused_as_where_it_is_read(tmp_path):
    shard(tmp_path / "0.tar", ("one.txt", b"first"), ("one.jpg", image_file((8, 8))), ("one.txt", b"second"))
    with pytest.raises(DataError, match=r"0\.tar: sample 'one' has the member one\.txt twice, again at byte"):
        index_shards(tmp_path)


def test_json_that_is_nested_too_deep_is_counted(tmp_path):
    members = ("txt", b"text"), ("jpg", image_file((8, 8)))
    shard(tmp_path / "0.tar", ("one.json", b"[" * 100_000), *((f"one.{name}", data) for name, data in members))
    shard(tmp_path / "1.tar", *((f"two.{name}", data) for name, data in members))
    assert index_shards(tmp_path).extra["unreadable"] == {"bad_json": 1}


def without_checksum(folder: Path) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["index_sha256"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "set-00000.index.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "expected version 2, found 1"),
        ({"sources": 5}, "malformed"),
        ({"sources": ["made"]}, "malformed.*none of the 1 sources"),
        ({"keys": b"a"}, "malformed.*expected key_starts that ascend from 0 to 1"),
        ({"keys": b"\xff" * 36}, "malformed.*expected keys in UTF-8"),
        ({"keys": ("a" + "é" * 17 + "a").encode()}, "malformed.*expected keys in UTF-8, each from the first byte"),
        ({"sizes": [[1, 2]] * 4}, "malformed.*expected image_starts that ascend from 0 to 4"),
        ({"image_starts": [0, 3, 2, 3]}, "malformed.*expected image_starts that ascend"),
        ({"offsets": [0, 512, 512, 1024]}, "expected offsets that ascend"),
        ({"offsets": [0, 512, 1024, 10**9]}, r"ends at byte 1000000000, expected at most the \d+ bytes"),
        ({"text_bytes": [1, 2]}, r"expected columns of .*'text_bytes': \[3\]"),
        ({"text_bytes": np.ones(3, np.int64)}, "malformed.*text_bytes are not of the types"),
        ({"sizes": None}, "expected columns"),
        (None, "malformed"),
        ("cut", "malformed"),
    ],
)
def test_an_invalid_index_is_refused(folder, change, message):
    path = folder / "set-00000.index.safetensors"
    indexes(folder)
    if isinstance(change, dict):
        with safe_open(path, "numpy") as file:
            described = json.loads(file.metadata()["index"])
        columns = load_file(path)
        for name, value in change.items():
            if name in ("version", "sources"):
                described[name] = value
            elif value is None:
                del columns[name]
            elif isinstance(value, bytes):
                columns[name] = np.frombuffer(value, np.uint8)
            else:
                columns[name] = value if isinstance(value, np.ndarray) else np.array(value, columns[name].dtype)
        save_file(columns, path, {"index": json.dumps(described)})
    else:
        path.write_bytes(path.read_bytes()[:-9] if change else b"[")
    with pytest.raises(DataError, match=r"set-00000\.index\.safetensors: expected sha256"):
        indexes(folder)
    without_checksum(folder)
    with pytest.raises(DataError, match=rf"sample index .*set-00000\.index\.safetensors.*{message}.*prepare index"):
        indexes(folder)
    assert [damage.kind for damage in Verification()(folder)] == ["wrong_index"]


def test_an_index_of_the_format_before_is_answered(folder):
    (folder / "set-00000.index.safetensors").rename(folder / "set-00000.index.json")
    with pytest.raises(
        DataError, match=r"no sample index .*set-00000\.index\.safetensors.*`prepare index FOLDER` writes it"
    ):
        indexes(folder)
    index_shards(folder)
    assert len(indexes(folder)) == 2
    assert [path.name for path in folder.glob("*.json")] == ["manifest.json"]


def test_a_key_that_is_no_utf8_and_a_source_are_kept(tmp_path):
    rows = [IndexRow(offset=0, key="\udce9", source="\udce9"), IndexRow(offset=512, key="é", sizes=((1, 2),) * 3)]
    write_index(tmp_path / "x", rows, end=1024)
    index = SampleIndex(tmp_path / "x")
    assert list(index) == rows
    with pytest.raises(IndexError):
        index[2]


def test_the_index_of_another_shard_is_found(folder):
    path = without_checksum(folder)
    path.write_bytes((folder / "set-00001.index.safetensors").read_bytes())
    with pytest.raises(DataError, match="expected 3 samples as in the manifest, found 1"):
        indexes(folder)


@pytest.mark.parametrize("change", [{"key": "set-b"}, {"text_bytes": 77}, {"sizes": ((9, 9),)}, {"offset": 512}])
def test_verification_compares_the_index_with_the_shard(folder, change):
    path = without_checksum(folder)
    index = SampleIndex(path)
    write_index(
        path, [replace(row, **change) if number == 1 else row for number, row in enumerate(index)], end=index.end
    )
    (damage,) = Verification(images=False)(folder)
    assert (damage.kind, damage.shard) == ("wrong_index", "set-00000.index.safetensors")


def test_indexing_a_dataset_that_is_not_as_its_manifest_says_stops(folder):
    (folder / "extra.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds extra\.tar, which its manifest\.json does not list"):
        index_shards(folder)
    (folder / "extra.tar").unlink()
    data = bytearray((folder / "set-00000.tar").read_bytes())
    data[600] ^= 1
    (folder / "set-00000.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"set-00000\.tar is damaged: expected sha256"):
        index_shards(folder)
    assert read_manifest(folder).num_samples == 4


def test_an_error_leaves_the_indexes_as_they_are(tmp_path):
    for name in "01":
        members = ("json", b"{}"), ("txt", b"text"), ("jpg", image_file((8, 8)))
        shard(tmp_path / f"{name}.tar", *((f"{name}.{ending}", data) for ending, data in members))
    index_shards(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == [
        *(f"{name}.{ending}" for name in "01" for ending in ("index.safetensors", "tar")),
        "manifest.json",
    ]
    with pytest.raises(DataError, match="none of 2 samples is valid as --format docdownstream"):
        index_shards(tmp_path, format="docdownstream")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_turned_by_its_exif_is_measured_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    for options, expected in ({}, (7, 5)), ({"exif": exif}, (5, 7)):
        buffer = io.BytesIO()
        Image.new("RGB", (7, 5)).save(buffer, kind, **options)
        assert upright_size(buffer.getvalue(), name="x") == expected
