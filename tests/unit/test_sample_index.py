"""The index beside a shard: offsets and sizes, equal bytes, and an error for each kind of damage."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.prepare import main
from datamodules.prepare.index import index_shards
from datamodules.shards.index import SampleIndex, index_path, load_index
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
    assert first.keys == ("set-00000000", "set-00000001", "set-00000002")
    assert first.sizes == (((30, 20), (10, 40)), (), ((5, 6),))
    assert first.text_bytes == (len("où?là".encode()), 1, 2002)
    assert first.supervised_bytes == (3, 0, 2)
    assert first.sources == ("made", "other", "made")
    with tarfile.open(folder / "set-00000.tar") as tar:
        members = tar.getmembers()
        starts = [m.offset for m in members if m.name.endswith(".json")]
        assert first.offsets == (*starts, tar.offset)
    assert second.offsets[0] == 0
    digests = [hashlib.sha256(index_path(folder / f"set-0000{i}.tar").read_bytes()).hexdigest() for i in (0, 1)]
    assert [shard.index_sha256 for shard in load_manifest(folder).shards] == digests


def test_a_sample_is_read_from_its_place_alone(folder):
    index = indexes(folder)[0]
    data = (folder / "set-00000.tar").read_bytes()
    for number, key in enumerate(index.keys):
        piece = data[index.offsets[number] : index.offsets[number + 1]]
        with tarfile.open(fileobj=io.BytesIO(piece + bytes(1024))) as tar:
            assert {name.split(".")[0] for name in tar.getnames()} == {key}


def test_indexing_again_gives_the_same_bytes_and_keeps_the_manifest(folder):
    path = folder / "manifest.json"
    before = json.loads(path.read_text())
    files = {file.name: file.read_bytes() for file in folder.glob("*.index.json")}
    old = before | {"seed": 5, "shards": [dict(shard) for shard in before["shards"]]}
    for shard in old["shards"]:
        del shard["index_sha256"]
    path.write_text(json.dumps(old))
    for file in folder.glob("*.index.json"):
        file.unlink()
    with pytest.raises(DataError, match=r"no sample index .*set-00000\.index\.json.*prepare index FOLDER"):
        indexes(folder)
    assert [damage.kind for damage in Verification()(folder)] == ["missing_index"] * 2
    assert main(["index", str(folder), "--workers", "2"]) == 0
    assert {file.name: file.read_bytes() for file in folder.glob("*.index.json")} == files
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
        assert index.keys == tuple(samples)
        assert index.sizes == (((7, 8),), ((8, 9),), ((3, 4),), ((1, 2),), (), ())
        assert index.text_bytes == (6, 4, 10, 8, 3, 0)
        assert index.supervised_bytes == (6, 4, 5, 2, 2, 0)
        assert index.sources == ("web", "web", "tables", "DocVQA", "web", "web")
        # A header that only carries the long name belongs to its sample.
        with tarfile.open(folder / "0.tar") as tar:
            assert index.offsets[1] < next(m.offset_data for m in tar if m.name.startswith(long)) - 512
        data = (folder / "0.tar").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data[index.offsets[1] : index.offsets[2]] + bytes(1024))) as tar:
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 1, found 2"),
        ({"keys": ["a"]}, r"expected 3 entries in every column, found \{'keys': 1"),
        ({"offsets": [0, 512, 512, 1024]}, "expected offsets that ascend"),
        ({"offsets": [0, 512, 1024, 10**9]}, r"ends at byte 1000000000, expected at most the \d+ bytes"),
        ({"text_bytes": [1, 2, -3]}, "malformed"),
        ({"sources": {"names": [], "of": [0, 0, 0]}}, "malformed"),
        ({"sizes": [[[1]], [], []]}, "malformed"),
        (None, "malformed"),
    ],
)
def test_an_invalid_index_is_refused(folder, change, message):
    path = folder / "set-00000.index.json"
    path.write_text("[" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"set-00000\.index\.json: expected sha256"):
        indexes(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"sample index .*set-00000\.index\.json.*{message}.*prepare index"):
        indexes(folder)
    assert [damage.kind for damage in Verification()(folder)] == ["wrong_index"]


def test_the_index_of_another_shard_is_found(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["index_sha256"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "set-00000.index.json"
    path.write_bytes((folder / "set-00001.index.json").read_bytes())
    with pytest.raises(DataError, match="expected 3 samples as in the manifest, found 1"):
        indexes(folder)


@pytest.mark.parametrize(("column", "value"), [("keys", "b"), ("text_bytes", 77), ("sizes", [[9, 9]])])
def test_verification_compares_the_index_with_the_shard(folder, column, value):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "set-00000.index.json"
    held = json.loads(path.read_text())
    held[column][1] = value
    path.write_text(json.dumps(held))
    (damage,) = Verification(images=False)(folder)
    assert (damage.kind, damage.shard) == ("wrong_index", "set-00000.index.json")


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_turned_by_its_exif_is_measured_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    for options, expected in ({}, (7, 5)), ({"exif": exif}, (5, 7)):
        buffer = io.BytesIO()
        Image.new("RGB", (7, 5)).save(buffer, kind, **options)
        assert upright_size(buffer.getvalue(), name="x") == expected
