"""Streams that resume after a lost connection."""

import io
import random
from dataclasses import replace
from typing import Any

import pytest

from alignvlm_pl.errors import DataError
from datamodules.storage.fetching import Policy
from datamodules.storage.stored_files import StoredFile, StoredStream, list_folder

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
