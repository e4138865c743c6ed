"""`shards verify`: every kind of damage is found and placed; a whole set has none."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.cli import main
from datamodules.shards.tar_walk import Damage, Member, walk
from datamodules.shards.verify import Verification
from datamodules.shards.writer import ShardWriter


def png(size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 50).save(buffer, "PNG")
    return buffer.getvalue()


def record() -> dict:
    content = [{"type": "image", "index": 0}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    return {"messages": [{"role": "user", "content": content}, answer]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0", samples_per_shard=3) as out:
        for _ in range(6):
            out.add(record(), [png()], ["png"])
    return tmp_path / "set"


def kinds(folder: Path, **options: bool) -> list[str]:
    return [damage.kind for damage in Verification(**options)(folder)]


def members(path: Path) -> list[Member]:
    return [found for found in walk(path) if isinstance(found, Member)]


def structure(path: Path) -> list[Damage]:
    return [found for found in walk(path) if isinstance(found, Damage)]


def test_a_whole_dataset_has_no_damage(folder, capsys):
    assert kinds(folder) == []
    path = folder / "set-00000.tar"
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.offset, m.data_offset, m.size) for m in members(path)] == expected
    assert main(["shards", "verify", str(folder)]) == 0
    assert "no damage" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cut_in_header", "cut_in_data", "cut_at_member", "zeroed_header", "bad_header"])
def test_damages_that_readers_pass_over_in_silence(folder, kind):
    path = folder / "set-00000.tar"
    third = members(path)[2]
    data = bytearray(path.read_bytes())
    if kind == "cut_in_header":
        data, at = data[: third.offset + 100], third.offset
    elif kind == "cut_in_data":
        data, at = data[: third.data_offset + 5], third.data_offset + 5
    elif kind == "cut_at_member":
        data, at = data[: third.offset], third.offset
    elif kind == "zeroed_header":
        data[third.offset : third.data_offset], at = bytes(512), third.offset
    else:
        data[third.offset + 148] ^= 0xFF
        at = third.offset
    path.write_bytes(data)
    (damage,) = structure(path)
    assert (damage.kind, damage.offset) == (kind, at)
    before = third.name if kind == "cut_in_data" else members(path)[-1].name
    assert damage.member == before
    found = kinds(folder)
    assert kind in found
    assert {"wrong_size", "wrong_sha256"} & set(found)
    assert "wrong_count" in found


def test_every_length_but_the_whole_is_noticed(folder):
    path = folder / "set-00000.tar"
    whole = path.read_bytes()
    last = members(path)[-1]
    end = last.data_offset + -(-last.size // 512) * 512
    for length in [0, 1, 511, 512, 700, *range(end - 1024, end + 1024, 256)]:
        path.write_bytes(whole[:length])
        assert structure(path), length
    path.write_bytes(whole)
    assert structure(path) == []


def test_a_page_saved_as_tar(folder):
    (folder / "set-00000.tar").write_text("<html>not found</html>" * 100)
    (damage,) = structure(folder / "set-00000.tar")
    assert damage.kind == "bad_header"
    assert "no tar" in damage.message


def rewrite(folder: Path, change) -> None:
    """Write the first shard again with other members, and its size into the manifest."""
    path = folder / "set-00000.tar"
    with tarfile.open(path) as tar:
        files = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": path.stat().st_size, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: [*files, files[-1]], ["repeated_member"]),
        (lambda files: [*files, *files[:2]], ["repeated_key", "wrong_count"]),
        (lambda files: files[1:], ["not_a_sample"]),
        (lambda files: files[:1] + files[2:], ["not_a_sample"]),
        (lambda files: [(files[0][0], b"{"), *files[1:]], ["bad_json"]),
        (
            lambda files: [files[0], (files[1][0], files[1][1][:60]), *files[2:]],
            ["wrong_picture", "undecodable_image"],
        ),
        (lambda files: files[:-2], ["wrong_count"]),
        (lambda files: [(f"{'d' * 120}/{name}", data) for name, data in files], []),
    ],
)
def test_damaged_samples(folder, change, expected):
    rewrite(folder, change)
    # Other members than those that were indexed: the index is reported beside them.
    assert [kind for kind in kinds(folder) if kind != "wrong_index"] == expected


def test_shards_missing_changed_extra_and_repeated(folder, capsys):
    shutil.copy(folder / "set-00001.tar", folder / "set-00002.tar")
    shutil.copy(folder / "set-00001.tar", folder / "set-00000.tar")
    found = kinds(folder)
    assert found[0] == "not_listed"
    assert found.count("repeated_key") == 3
    (folder / "set-00001.tar").unlink()
    assert "missing" in kinds(folder)
    assert main(["shards", "verify", "--fast", str(folder)]) == 1
    output = capsys.readouterr().out
    assert f"{folder}/set-00001.tar: the manifest lists this shard, but it is not there (missing)" in output
    assert main(["shards", "verfy", str(folder)]) == 1
    assert "did you mean 'verify'" in capsys.readouterr().err
