"""Shards: equal input gives equal bytes, and nothing that is not whole looks whole."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.shards.manifest import load_manifest, verify_shard
from datamodules.shards.writer import ShardWriter

ROOT = Path(__file__).parents[2]


def png(shade: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int = 0, images: int = 1) -> dict[str, Any]:
    parts = [{"type": "image", "index": index} for index in range(images)]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": f"question {number}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"answer {number}"}]},
        ]
    }


def writer(folder: Path, **options: Any) -> ShardWriter:
    return ShardWriter(folder, **{"name": "set", "source": "made", "license": "CC0-1.0", **options})


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_normal_form_is_written_with_names_sizes_and_checksums(tmp_path):
    with writer(tmp_path) as out:
        assert out.add(record(images=2), [png(1), png(2, (9, 5))], ["png", "PNG"]) == "set-00000000"
    files = members(tmp_path / "set-00000.tar")
    assert list(files) == ["set-00000000.json", "set-00000000.0.png", "set-00000000.1.png"]
    assert files["set-00000000.1.png"] == png(2, (9, 5))
    stored = json.loads(files["set-00000000.json"])
    assert [(image["file"], image["w"], image["h"]) for image in stored["images"]] == [
        ("0.png", 6, 4),
        ("1.png", 9, 5),
    ]
    assert (stored["source"], stored["license"], stored["id"]) == ("made", "CC0-1.0", "set-00000000")


def test_two_runs_give_the_same_bytes(tmp_path):
    for folder in ("first", "second"):
        with writer(tmp_path / folder, samples_per_shard=3) as out:
            for number in range(7):
                out.add(record(number), [png(number)], ["png"])
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        "manifest.json",
        *(f"set-0000{i}.{end}" for i in range(3) for end in ("index.safetensors", "tar")),
    ]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_manifest_counts_samples_by_shard_and_source(tmp_path):
    with writer(tmp_path, samples_per_shard=3) as out:
        for number in range(7):
            out.add(record(number) | ({"source": "other"} if number < 2 else {}), [png()], ["png"])
        out.extra["seed"] = 5
    manifest = load_manifest(tmp_path)
    for shard in manifest.shards:
        verify_shard(manifest.shard_path(shard), shard, verify_sha256=True)
    assert [shard.num_samples for shard in manifest.shards] == [3, 3, 1]
    assert (manifest.num_samples, manifest.sources) == (7, {"made": 5, "other": 2})
    assert manifest.extra == {"seed": 5}


def test_a_new_shard_begins_before_max_bytes_is_passed(tmp_path):
    with writer(tmp_path, max_bytes=2 * (len(png()) + 420)) as out:
        for number in range(4):
            out.add(record(number), [png()], ["png"])
    assert [shard.num_samples for shard in load_manifest(tmp_path).shards] == [2, 2]


def test_an_error_inside_the_block_leaves_nothing(tmp_path):
    out = writer(tmp_path, samples_per_shard=1)
    with pytest.raises(DataError, match="2 images but 1 extensions"), out:
        [out.add(record(), images, ["png"]) for images in ([png()], [png()], [png(), png()])]
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from datamodules.shards.writer import ShardWriter
turn = {"role": "user", "content": [{"type": "text", "text": "a"}]}
out = ShardWriter(sys.argv[1], name="set", source="made", license="none", samples_per_shard=1).__enter__()
for _ in range(2):
    out.add({"messages": [turn]}, [], [])
os._exit(9)
"""


def test_a_killed_run_never_looks_whole_and_can_be_repeated(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False, cwd=ROOT).returncode == 9
    # The open shard still has its temporary name, and there is no manifest.
    left = ["set-00000.index.safetensors", "set-00000.tar", "set-00001.tar.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    with pytest.raises(DataError, match=r"not a complete dataset.*interrupted"):
        load_manifest(tmp_path)
    with writer(tmp_path) as again:
        again.add(record(), [png()], ["png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", *left[:2]]


def test_a_finished_dataset_is_only_replaced_when_allowed(tmp_path):
    for options in ({}, {"overwrite": True}):
        with writer(tmp_path, **options) as out:
            out.add(record(), [png()], ["png"])
    with pytest.raises(DataError, match="already holds a finished dataset"):
        writer(tmp_path).__enter__()


def test_the_dataset_of_a_longer_name_is_left_alone(tmp_path):
    with writer(tmp_path, name="set-b") as out:
        out.add(record(), [png()], ["png"])
    (tmp_path / "manifest.json").unlink()
    with writer(tmp_path, name="set") as out:
        out.add(record(), [png()], ["png"])
    assert (tmp_path / "set-b-00000.tar").exists()


@pytest.mark.parametrize(
    ("change", "images", "message"),
    [
        ({}, 2, r"sample set-00000000: 1 image placeholders in the messages but 2 images"),
        ({"messages": []}, 1, "'messages' must be a list with at least one turn"),
        ({"messages": [{"role": "robot", "content": []}]}, 1, "needs a role of system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 1, "a part is"),
        ({"references": "one"}, 1, "'references' must be a list of strings"),
        ({"lines": [{"text": "a", "box": [1, 2, 3]}]}, 1, r"a line is \{text, box"),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(tmp_path, change, images, message):
    out = writer(tmp_path)
    with pytest.raises(DataError, match=message), out:
        out.add(record() | change, [png()] * images, ["png"] * images)


def test_an_image_that_is_none_is_refused_by_name(tmp_path):
    with (
        pytest.raises(DataError, match=r"sample set-00000000: image 0.png: not an image that can be read"),
        writer(tmp_path) as out,
    ):
        out.add(record(), [b"no image"], ["png"])
    with (
        pytest.raises(DataError, match=r"image extension 'exe', expected one of png"),
        writer(tmp_path) as out,
    ):
        out.add(record(), [png()], ["exe"])


def test_names_with_dots_are_refused():
    with pytest.raises(ConfigError, match=r"'2301\.0123'"):
        writer(Path("unused"), name="2301.0123")


def test_an_empty_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample was written"), writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_reported_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, 7))
    with (
        pytest.raises(DataError, match=r"no space for shards in .*bytes needed, 7 free"),
        writer(tmp_path) as out,
    ):
        out.add(record(), [png()], ["png"])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="no space left; free space"), writer(tmp_path) as out:
        out.add(record(), [png()], ["png"])
    assert list(tmp_path.iterdir()) == []


def test_writing_and_preparing_import_no_torch():
    code = (
        "import sys, datamodules, datamodules.shards.writer, datamodules.shards.manifest, datamodules.prepare.jsonl;"
        "import datamodules.prepare.index; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
