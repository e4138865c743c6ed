"""Streams that resume after a lost connection, and members of a zip read by their place."""

import io
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import DataError
from datamodules.prepare import llava
from datamodules.prepare.llava import read_directory, read_member
from datamodules.shards.sample import SampleError
from datamodules.storage.fetching import Policy
from datamodules.storage.stored_files import StoredFile, StoredStream, list_folder, local_file

DATA = random.Random(0).randbytes(100_000)
AT_ONCE = Policy(retries=2, backoff_s=0)


@pytest.fixture
def file() -> Any:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/stream/a.bin", DATA)
    yield list_folder("memory://stream")[0]
    memory.rm("/stream", recursive=True)


class Flaky(io.BytesIO):
    """Gives a few thousand bytes at a time, and now and then a lost connection."""

    failures = 0
    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        Flaky.reads += 1
        if Flaky.failures and Flaky.reads % 5 == 0:
            Flaky.failures -= 1
            raise ConnectionResetError("reset by peer")
        return super().read(min(size or 0, 3000))


def test_it_resumes_at_the_byte_where_the_connection_was_lost(file, monkeypatch):
    monkeypatch.setattr(StoredFile, "open", lambda self, forward: Flaky(DATA))
    monkeypatch.setattr(Flaky, "failures", 6)
    monkeypatch.setattr(Flaky, "reads", 0)
    with io.BufferedReader(StoredStream(file, policy=AT_ONCE), 7000) as stream:
        assert stream.read() == DATA
        stream.seek(-10, io.SEEK_END)
        assert (stream.read(4), stream.tell()) == (DATA[-10:-6], len(DATA) - 6)
    assert Flaky.failures == 0


def test_a_store_that_fails_for_good_names_file_and_byte(file, monkeypatch):
    def lost(self: StoredFile, forward: bool) -> Any:
        raise DataError(f"{self.path} cannot be opened: ConnectionError")

    stream = StoredStream(file, policy=AT_ONCE)
    assert stream.read(10) == DATA[:10]
    stream._drop()
    monkeypatch.setattr(StoredFile, "open", lost)
    with pytest.raises(DataError, match=r"a\.bin cannot be opened: .*; run the same command again"):
        stream.read(10)
    monkeypatch.setattr(StoredFile, "open", lambda self, forward: Flaky())
    monkeypatch.setattr(Flaky, "read", lambda self, size: (_ for _ in ()).throw(ValueError("odd answer")))
    with pytest.raises(DataError, match=r"a\.bin does not read at byte 10 \(ValueError: odd answer\); run the same"):
        stream.read(10)


def test_a_file_that_is_shorter_than_it_was_listed(file):
    stream = StoredStream(replace(file, size=len(DATA) + 1), policy=AT_ONCE)
    with pytest.raises(DataError, match=r"a\.bin ends at byte 100000, expected 100001 bytes as listed"):
        stream.readall()


# Zips


@pytest.fixture
def archive(tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
            made.writestr(f"./b/{name}.bin", name.encode() * 500, method)
        made.writestr("b/", b"")
        made.writestr("twice", b"old")
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("twice", b"new")
    return tmp_path / "a.zip"


def test_members_by_their_place(archive):
    places = read_directory(local_file(archive))
    assert set(places) == {"b/stored.bin", "b/deflated.bin", "twice"}
    with StoredStream(local_file(archive)) as stream:
        for name in ("stored", "deflated"):
            assert read_member(stream, places[f"b/{name}.bin"], where="x") == name.encode() * 500
        assert read_member(stream, places["twice"], where="x") == b"new"


def test_members_that_cannot_be_read(archive, monkeypatch):
    place = read_directory(local_file(archive))["b/deflated.bin"]
    cases = {
        "x is encrypted in": place._replace(flags=1),
        "x is damaged in .*no member begins at byte": place._replace(offset=place.offset + 1),
        "x is damaged in .*Bad CRC-32": place._replace(crc=place.crc ^ 1),
        "x is damaged in .*it ends beyond the end": place._replace(packed=1 << 20),
        "x is damaged in .*Bad CRC-32 for": place._replace(packed=place.packed // 2),
        "x is damaged in .*it ends after 4000 of 4001 bytes": place._replace(size=4001),
        "x is damaged in .*NotImplementedError": place._replace(method=99),
    }
    with StoredStream(local_file(archive)) as stream:
        for message, wrong in cases.items():
            with pytest.raises(SampleError, match=message) as caught:
                read_member(stream, wrong, where="x")
            assert caught.value.reason == "undecodable_image"
        monkeypatch.setattr(llava, "MAX_MEMBER_BYTES", 3999)
        with pytest.raises(SampleError, match="x would unpack to 4000 bytes, expected at most 3999"):
            read_member(stream, place, where="x")
        monkeypatch.undo()
        # What the store does is no fault of the member.
        lost = StoredStream(replace(local_file(archive), path=str(archive) + ".none"))
        with pytest.raises(DataError, match="cannot be opened") as caught_store:
            read_member(lost, place, where="x")
        assert not isinstance(caught_store.value, SampleError)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_zip_that_is_cut_has_no_directory(archive, keep):
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.zip is no whole zip of \d+ bytes \(BadZipFile"):
        read_directory(local_file(archive))
