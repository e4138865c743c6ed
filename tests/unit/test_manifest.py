"""The manifest finds cut, missing and damaged shards before anything is read."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.prepare.index import read_samples
from datamodules.shards.manifest import load_manifest, verify_shard
from datamodules.shards.sample_formats import read_normal
from datamodules.shards.writer import ShardWriter


@pytest.fixture
def folder(tmp_path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    turn = {"role": "user", "content": [{"type": "image", "index": 0}]}
    with ShardWriter(tmp_path, name="set", source="made", license="CC0-1.0", samples_per_shard=3) as out:
        for _ in range(6):
            out.add({"messages": [turn]}, [buffer.getvalue()], ["png"])
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_shard_is_named(folder):
    (folder / "set-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*set-00001\.tar is missing"):
        load_manifest(folder)


def test_a_cut_shard_is_named_with_both_sizes(folder):
    path = folder / "set-00001.tar"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match=rf"set-00001\.tar is truncated: expected {whole} bytes, found 1024"):
        load_manifest(folder)


def test_a_changed_byte_is_found_by_the_checksum_only(folder):
    path = folder / "set-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert load_manifest(folder).num_samples == 6
    with pytest.raises(DataError, match=r"set-00000\.tar is damaged: expected sha256 [0-9a-f]{16}"):
        verify_shard(folder / "set-00000.tar", load_manifest(folder).shards[0], verify_sha256=True)


def test_a_folder_without_manifest_is_no_dataset(folder):
    with pytest.raises(DataError, match="no such folder"):
        load_manifest(folder / "elsewhere")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"not a complete dataset: no manifest\.json in it"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "expected version 1, found 9"),
        ({"num_samples": 7}, "num_samples is 7, the shards sum to 6"),
        ({"shards": []}, "the dataset is empty"),
        ({"shards": [{"path": "set-00000.tar"}]}, "missing or malformed"),
    ],
)
def test_a_malformed_manifest_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(DataError, match=message):
        load_manifest(folder)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_manifest(folder)


def test_indexing_counts_and_finds_cuts_at_every_place(folder):
    path = folder / "set-00000.tar"
    assert len(read_samples(path, adapter=read_normal, source="")[0]) == 3
    whole = path.read_bytes()
    # Samples are a json and a png of one block each, with one header block each: the end mark is at 6 * 1024.
    for cut in (512, 700, 1024, 2048, 4096, 5 * 1024 + 512, 6 * 1024, 6 * 1024 + 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"set-00000\.tar is (cut|damaged)"):
            read_samples(path, adapter=read_normal, source="")


FIRST = {"path": "set-00000.tar", "num_samples": 3, "bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": {"path": "set-00000.tar"}}, "expected list, found {'path'"),
        ({"shards": ["set-00000.tar"]}, "missing or malformed"),
        ({"shards": [FIRST | {"bytes": -1}]}, "expected a whole number, found -1"),
        ({"shards": [FIRST | {"bytes": "1"}]}, "expected a whole number, found '1'"),
        ({"shards": [FIRST | {"num_samples": True}]}, "expected a whole number, found True"),
        ({"shards": [FIRST | {"num_samples": 3.0}]}, "expected a whole number, found 3.0"),
        ({"shards": [FIRST | {"sha256": "../x"}]}, "expected 64 hexadecimal digits, found '../x'"),
        ({"shards": [FIRST | {"index_sha256": 5}]}, "expected str, found 5"),
        ({"shards": [FIRST, FIRST]}, "shard set-00000.tar is listed twice"),
        ({"num_samples": float("nan")}, "expected a whole number, found nan"),
        ({"name": ["set"]}, r"expected str, found \['set'\]"),
        ({"license": None}, "expected str, found None"),
        ({"sources": {"made": "6"}}, "expected a whole number, found '6'"),
        ({"sources": [1]}, r"expected dict, found \[1\]"),
        ({"benchmark": ["docvqa"]}, r"expected str, found \['docvqa'\]"),
        ({"skipped": {"bad": "2"}}, "expected a whole number, found '2'"),
        ({"skipped_first": {"bad": [1]}}, "expected str, found 1"),
    ],
)
def test_every_field_of_a_manifest_has_its_type(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(DataError, match=message):
        load_manifest(folder)
