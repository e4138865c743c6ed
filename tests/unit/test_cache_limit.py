"""The cache of fetched files stays below its limit without taking away what is being read."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignvlm_pl.errors import ConfigError
from datamodules.shards.manifest import load_manifest
from datamodules.shards.writer import ShardWriter
from datamodules.storage import cache_limit
from datamodules.storage.cache_limit import make_room, open_held
from datamodules.storage.location import Storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    turn = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0", samples_per_shard=1) as out:
        for _ in range(5):
            out.add({"messages": [turn]}, [], [])
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch) -> None:
    monkeypatch.setattr(cache_limit, "GRACE_S", 0.0)


def remote(folder: Path, cache: Path, *, shards: float):
    """The set as one that is fetched, with a cache for so many of its equal shards."""
    size = load_manifest(folder).shards[0].bytes
    storage = Storage(cache=cache, allow_pipe=True, max_cache_bytes=int(size * shards))
    return load_manifest(f"pipe:cat '{folder}'/{{name}}", storage=storage)


def copies(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/set-*.tar"))


def age(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path.with_name(".source.json"), (when, when))


def test_the_least_recently_used_shards_go_and_come_back(folder, tmp_path):
    manifest = remote(folder, tmp_path / "cache", shards=3)
    for number in range(3):
        age(manifest.shard_path(manifest.shards[number]), 100 - number)
    manifest.shard_path(manifest.shards[0])  # used again just now
    manifest.shard_path(manifest.shards[3])
    assert copies(tmp_path / "cache") == ["set-00000.tar", "set-00002.tar", "set-00003.tar"]
    path = manifest.shard_path(manifest.shards[1])
    assert path.read_bytes() == (folder / "set-00001.tar").read_bytes()
    assert len(copies(tmp_path / "cache")) == 3


def test_a_set_larger_than_the_cache_is_read_again_and_again(folder, tmp_path):
    manifest = remote(folder, tmp_path / "cache", shards=2)
    for _ in range(3):
        for shard in manifest.shards:
            with manifest.open_shard(shard) as stream:
                assert stream.read() == (folder / shard.path).read_bytes()
            assert len(copies(tmp_path / "cache")) <= 2


def test_an_open_shard_stays_also_for_other_processes(folder, tmp_path, caplog):
    manifest = remote(folder, tmp_path / "cache", shards=2)
    with manifest.open_shard(manifest.shards[0]) as stream:
        age(Path(stream.name), 1000)
        code = (
            "import sys; from pathlib import Path; from datamodules.storage import cache_limit\n"
            "cache_limit.GRACE_S = 0.0\n"
            f"cache_limit.make_room(Path({str(tmp_path / 'cache')!r}), limit=1, needed=0)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
        assert copies(tmp_path / "cache") == ["set-00000.tar"]
        manifest.shard_path(manifest.shards[1])
        manifest.shard_path(manifest.shards[2])
        assert copies(tmp_path / "cache") == ["set-00000.tar", "set-00002.tar"]
        make_room(tmp_path / "cache", limit=1, needed=0)
        assert "more than max_cache_bytes 1: the rest is in use" in caplog.text
    make_room(tmp_path / "cache", limit=1, needed=0)
    assert copies(tmp_path / "cache") == []


def test_a_path_given_a_moment_ago_stays(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_limit, "GRACE_S", 30.0)
    manifest = remote(folder, tmp_path / "cache", shards=1)
    paths = [manifest.shard_path(shard) for shard in manifest.shards]
    assert all(path.exists() for path in paths)
    for path in paths:
        age(path, 31)
    make_room(tmp_path / "cache", limit=1, needed=0)
    assert not any(path.exists() for path in paths)


def test_a_shard_removed_between_finding_and_opening_is_fetched_again(tmp_path):
    found = []

    def find() -> Path:
        path = tmp_path / f"{len(found)}.tar"
        found.append(path)
        if len(found) > 2:
            path.write_bytes(b"whole")
        return path

    with open_held(find) as stream:
        assert stream.read() == b"whole"
    assert len(found) == 3


def test_a_limit_below_one_shard_is_a_wrong_setting(folder, tmp_path):
    manifest = remote(folder, tmp_path / "cache", shards=0.5)
    with pytest.raises(ConfigError, match=r"larger than the cache may be \(\d+ bytes, max_cache_bytes\)"):
        manifest.shard_path(manifest.shards[0])


def test_without_a_limit_everything_stays(folder, tmp_path):
    storage = Storage(cache=tmp_path / "cache", allow_pipe=True)
    manifest = load_manifest(f"pipe:cat '{folder}'/{{name}}", storage=storage)
    for shard in manifest.shards:
        manifest.open_shard(shard).close()
    assert len(copies(tmp_path / "cache")) == 5


def test_a_local_shard_is_opened_where_it_lies(folder):
    manifest = load_manifest(folder)
    with manifest.open_shard(manifest.shards[0]) as stream:
        assert Path(stream.name) == folder / "set-00000.tar"
