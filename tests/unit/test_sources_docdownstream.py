"""DocDownstream: the same samples from a folder and from the archive in pieces, invalid lines, damage, what is held."""

import bz2
import gzip
import io
import json
import os
import pickle
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare import main
from datamodules.prepare.docdownstream import DocDownstreamArchive, DocDownstreamFolder
from datamodules.prepare.sources.source import SourceSample, image_bytes
from datamodules.shards.sample import SampleError, message_text
from datamodules.shards.tar_walk import stream_files
from datamodules.storage.stored_files import StoredFile, local_file


def page(number: int) -> str:
    return f"./imgs/DUE_Benchmark/DocVQA/pngs/abcd_{number}.png"


def line(*pages: str, question: str = "Total?", **changes: Any) -> dict[str, Any]:
    return {
        "image": list(pages),
        "messages": [
            {"role": "user", "content": "<|image|>" * len(pages) + question},
            {"role": "assistant", "content": "$1,204.50"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA",
    } | changes


def image_file(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (number + 2, 3), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


LINES = [
    line(page(0), question="a"),
    line(page(0), page(2), question="b"),
    line(page(1), question="c", dataset_name="ChartQA"),
    line(page(0), question="d"),
    line(page(3), page(1), page(2), question="e"),
    line(page(2), page(2), question="f"),
    line(question="no page", dataset_name="ChartQA"),
]
BAD: list[Any] = [
    "{",
    "[1]",
    line(page(9)),
    line(page(0), page(9)),
    line(page(0), messages=[{"role": "user", "content": "no mark"}]),
    line(page(4)),
    line(page(4), page(3)),
    line(image={"a": 1}),
    line(page(0), messages=[{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": ""}]),
]
REASONS = {
    "bad_json": 2,
    "missing_image": 2,
    "placeholder_count": 1,
    "undecodable_image": 2,
    "bad_row": 1,
    "empty_answer": 1,
}


def write_lines(root: Path, lines: Sequence[Any]) -> Path:
    path = root / "train.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def pages() -> dict[str, bytes]:
    held = {page(number): image_file(number) for number in range(4)}
    return {"./imgs/unused.bin": os.urandom(5000)} | held | {page(4): image_file(4)[:50]}


@pytest.fixture
def archive(tmp_path) -> list[StoredFile]:
    """Make a gzipped tar of the pages in three pieces, cut anywhere; page 1 comes twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in [*pages().items(), (page(1), b"another")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    cuts = (0, len(data) // 3, len(data) // 2, len(data))
    pieces = []
    for number in range(3):
        path = tmp_path / f"partial-imgs.{number:02d}"
        path.write_bytes(data[cuts[number] : cuts[number + 1]])
        pieces.append(local_file(path))
    return pieces


@pytest.fixture
def images(tmp_path) -> Path:
    for name, data in pages().items():
        path = tmp_path / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "pages"


def read(raw: Any) -> tuple[dict[str, SourceSample], Counter[str]]:
    """Samples by their question, and counts of invalid lines."""
    samples, bad = {}, Counter()
    for part in pickle.loads(pickle.dumps(list(raw.parts()))):
        for item in pickle.loads(pickle.dumps(raw)).read(part):
            if isinstance(item, SampleError):
                bad[item.reason] += 1
            else:
                samples[message_text(item.record["messages"][0])] = item
    return samples, bad


def contents(sample: SourceSample) -> list[bytes]:
    return [image_bytes(image, where="test") for image, _ in sample.images]


EXPECTED = {"a": [0], "b": [0, 2], "c": [1], "d": [0], "e": [3, 1, 2], "f": [2, 2], "no page": []}


def test_pages_of_a_folder(tmp_path, images):
    samples, bad = read(DocDownstreamFolder(path=write_lines(tmp_path, [*LINES, *BAD]), image_root=images))
    assert {name: contents(sample) for name, sample in samples.items()} == {
        name: [image_file(number) for number in numbers] for name, numbers in EXPECTED.items()
    }
    assert bad == REASONS
    assert samples["c"].record == {
        "id": "train/3",
        "source": "ChartQA",
        "task": "qa_sft",
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "$1,204.50"}]},
        ],
    }


def test_pages_may_be_called_images_and_turns_may_be_in_parts(tmp_path, images):
    given = line(page(0), page(1), question="and?")
    given["images"] = given.pop("image")
    first = {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "one"}]}
    answer = {"role": "assistant", "content": "$1"}
    given["messages"] = [first, answer, {"role": "user", "content": "<|image|>two"}, answer]
    samples, bad = read(DocDownstreamFolder(path=write_lines(tmp_path, [given]), image_root=images))
    assert not bad
    sample = samples["one"]
    assert contents(sample) == [image_file(0), image_file(1)]
    parts = [part for turn in sample.record["messages"] for part in turn["content"]]
    assert [part["index"] for part in parts if part["type"] == "image"] == [0, 1]


def test_pages_of_the_archive_in_pieces_give_the_same_samples(tmp_path, images, archive):
    lines = write_lines(tmp_path, [*LINES, *BAD])
    from_folder, _ = read(DocDownstreamFolder(path=lines, image_root=images))
    raw = DocDownstreamArchive(path=lines, pieces=tuple(reversed(archive)))
    samples, bad = read(raw)
    assert bad == REASONS
    assert {name: (sample.record, contents(sample)) for name, sample in samples.items()} == {
        name: (sample.record, contents(sample)) for name, sample in from_folder.items()
    }
    assert [part.rows for part in raw.parts()] == [len(LINES) + len(BAD)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pages", "partial-imgs.00", "partial-imgs.01", "partial-imgs.02", "train.jsonl",
    ]  # fmt: skip


def test_samples_come_when_their_last_page_has_passed_and_pages_go(tmp_path, archive, monkeypatch):
    """Pages that lines still need lie in files; none is left when the lines are answered."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raw = DocDownstreamArchive(path=write_lines(tmp_path, LINES), pieces=tuple(archive))
    for item in raw.read(raw.parts()[0]):
        assert isinstance(item, SourceSample)
        seen.append((message_text(item.record["messages"][0]), len(list(tmp_path.glob("pages-*/*")))))
    # Page 0 waits for page 2 (b), pages 1 and 2 for page 3 (e); f names page 2 twice.
    assert seen == [("no page", 0), ("a", 1), ("d", 1), ("c", 2), ("b", 2), ("f", 2), ("e", 0)]
    assert not list(tmp_path.glob("pages-*"))


def test_only_some_datasets(tmp_path, images, archive):
    lines = write_lines(tmp_path, [*LINES, *BAD])
    chart = {"path": lines, "sources": ("ChartQA",)}
    for raw in (
        DocDownstreamFolder(**chart, image_root=images),
        DocDownstreamArchive(**chart, pieces=tuple(archive)),
    ):
        samples, bad = read(raw)
        assert set(samples) == {"c", "no page"}
        assert bad == {"bad_json": 2}
    with pytest.raises(ConfigError, match=r"has no lines of 'ChartQ'; did you mean 'ChartQA'"):
        DocDownstreamFolder(path=lines, sources=("ChartQ",), image_root=images).parts()


def test_sizes_count_a_page_as_often_as_it_is_asked_about(tmp_path, images, archive):
    lines = write_lines(tmp_path, LINES[:4])
    folder = DocDownstreamFolder(path=lines, image_root=images)
    assert folder.spool_bytes() == lines.stat().st_size
    pages = 3 * len(image_file(0)) + len(image_file(1)) + len(image_file(2))
    assert folder.input_bytes() == folder.spool_bytes() + pages
    charts = DocDownstreamFolder(path=lines, sources=("ChartQA",), image_root=images)
    assert charts.input_bytes() == charts.spool_bytes() + len(image_file(1))
    whole = sum(piece.size for piece in archive)
    assert DocDownstreamArchive(path=lines, pieces=tuple(archive)).input_bytes() == whole * 5 // 3


def test_unsafe_paths_are_refused(tmp_path, images):
    rows = [line("../train.jsonl"), line("/etc/passwd")]
    assert read(DocDownstreamFolder(path=write_lines(tmp_path, rows), image_root=images))[1] == {"unsafe_path": 2}


def test_parts_cut_a_long_file(tmp_path, images):
    lines = write_lines(tmp_path, [line(page(0), question=str(number)) for number in range(4100)])
    raw = DocDownstreamFolder(path=lines, image_root=images)
    assert [part.rows for part in raw.parts()] == [2048, 2048, 4]
    samples, bad = read(raw)
    assert (list(samples), bad) == ([str(number) for number in range(4100)], {})


# Damage


def unpacked(archive: list[StoredFile]) -> bytes:
    return gzip.decompress(b"".join(Path(piece.path).read_bytes() for piece in archive))


def streamed(path: Path) -> list[str]:
    return [name for name, _ in stream_files([local_file(path)], lambda name: True)]


def test_a_tar_that_is_not_zipped(tmp_path, archive):
    (tmp_path / "plain.tar").write_bytes(unpacked(archive))
    assert [
        data for name, data in stream_files([local_file(tmp_path / "plain.tar")], lambda name: name == page(2))
    ] == [image_file(2)]
    (tmp_path / "a.tar").write_bytes(bz2.compress(unpacked(archive)))
    with pytest.raises(DataError, match=r"a\.tar: it is bzip2, expected a plain tar: unpack it first$"):
        streamed(tmp_path / "a.tar")


def test_long_names(tmp_path):
    name = "imgs/" + "a" * 150 + "/" + "b" * 120 + ".png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        assert streamed(tmp_path / "long.tar") == [name]


def test_a_missing_piece_is_named(tmp_path, archive):
    raw = DocDownstreamArchive(path=write_lines(tmp_path, LINES), pieces=(archive[0], archive[2]))
    with pytest.raises(ConfigError, match=r"numbered from 0 without a gap, found \[0, 2\]"):
        raw.parts()
    with pytest.raises(ConfigError, match="found"):
        DocDownstreamArchive(path=raw.path, pieces=(archive[1],)).parts()
    cut = DocDownstreamArchive(path=raw.path, pieces=tuple(archive[:2]))
    with pytest.raises(DataError, match=r"partial-imgs\.01, near byte \d+: the archive is damaged or a piece"):
        list(cut.read(cut.parts()[0]))
    with pytest.raises(DataError, match=r"there is no .*partial-imgs\.03"):
        main(
            [
                "docdownstream",
                str(raw.path),
                str(tmp_path / "out"),
                "--archive",
                str(tmp_path / "partial-imgs.03"),
            ]
        )


def test_damage_that_tarfile_takes_for_the_end_is_found(tmp_path, archive):
    whole = unpacked(archive)
    path = tmp_path / "damaged.tar"
    at = whole.index(page(2).encode())
    assert at % 512 == 0
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    cases = {
        r"at byte \d+, member .*: broken header after this member": whole[:at] + b"\xff" * 100 + whole[at + 100 :],
        "a header of zeros in the middle": whole[:at] + bytes(512) + whole[at + 512 :],
        "the file ends after this member without an end-of-archive mark": whole[:at],
        "the end-of-archive mark after this member is cut": whole[: end + 512],
        "the file ends inside this member, which has": whole[: at + 520],
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            streamed(path)
    path.write_bytes(whole)
    assert len(streamed(path)) == 7
