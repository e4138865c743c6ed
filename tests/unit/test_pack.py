"""Packing: the same bytes for any number of processes, a shuffle over everything, and a true account of the rows."""

import json
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.pack.engine import pack, print_yield
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.pack.plan import make_plan, repeated_positions
from datamodules.prepare.pack.spool import ROW
from datamodules.prepare.pack.work_folder import WorkFolder
from datamodules.prepare.sources.source import Part, SourceSample
from datamodules.shards.index import load_index
from datamodules.shards.manifest import Manifest, load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample import SampleError
from datamodules.shards.verify import Verification


def record(text: str, images: int = 0, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image", "index": index} for index in range(images)]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"messages": [turn, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], **fields}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Raw data of text; each part is a tuple of (text, id or None); a text `bad` is an invalid row."""

    content: tuple[tuple[tuple[str, str | None], ...], ...]
    name: str = "rows"
    source: str = "made"
    license: str = "CC0-1.0"

    def parts(self) -> list[Part]:
        return [Part(name=f"part {number}", payload=(number,)) for number in range(len(self.content))]

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        for row, (text, given) in enumerate(self.content[int(part.payload[0])]):
            if text == "bad":
                yield SampleError(f"{part.name}, row {row}: bad", "bad_row")
            else:
                fields = {"source": part.name} | ({} if given is None else {"id": given})
                yield SourceSample(record=record(text, **fields), images=[])

    def input_bytes(self) -> int:
        return 1000


def texts(folder: Path) -> list[str]:
    manifest = load_manifest(folder, verify_sha256=True)
    raw = [json.loads(sample["json"]) for sample in read_range(manifest, 0, manifest.num_samples)]
    return [one["messages"][0]["content"][-1]["text"] for one in raw]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def jsonl(tmp_path) -> JsonlData:
    (tmp_path / "raw").mkdir()
    lines = []
    for number in range(60):
        name = f"{number % 50}.png"
        Image.effect_noise((20, 10 + number % 3), 60).save(tmp_path / "raw" / name)
        turns = [{"role": "user", "content": f"<|image|>q{number}"}, {"role": "assistant", "content": "a"}]
        lines.append({"image": name, "messages": turns, "dataset_name": f"d{number // 20}"})
    lines[7]["image"] = "none.png"
    path = tmp_path / "raw" / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonlData(path=path, image_root=tmp_path / "raw", source="set", part_bytes=900)


def packed(jsonl: JsonlData, out: Path, **options: Any) -> Manifest:
    return pack(jsonl, PackOptions(out=out, name="set", samples_per_shard=16, **options))


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(jsonl, tmp_path):
    manifest = packed(jsonl, tmp_path / "one", workers=1)
    packed(jsonl, tmp_path / "two", workers=2)
    packed(jsonl, tmp_path / "other", seed=1)
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two")
    shards = [f"set-0000{i}.{end}" for i in range(4) for end in ("index.safetensors", "tar")]
    assert list(one) == ["manifest.json", "report.json", *shards]
    assert one["set-00000.tar"] != content(tmp_path / "other")["set-00000.tar"]
    assert sorted(texts(tmp_path / "one")) == sorted(texts(tmp_path / "other"))
    assert [shard.num_samples for shard in manifest.shards] == [16, 16, 16, 11]
    assert list(Verification()(tmp_path / "one")) == []
    keys = [row.key for shard in manifest.shards for row in load_index(manifest, shard)]
    assert keys == [f"set-{number:08d}" for number in range(59)]


def test_the_shuffle_is_over_everything(tmp_path):
    raw = Rows(content=tuple(tuple((f"{part}.{row}", None) for row in range(100)) for part in range(4)))
    manifest = pack(raw, PackOptions(out=tmp_path / "set", samples_per_shard=50))
    assert manifest.sources == {f"part {part}": 100 for part in range(4)}
    for shard in manifest.shards:
        mixed = Counter(row.source for row in load_index(manifest, shard))
        # Hypergeometric: 12.5 of each are expected, with a deviation of 3.
        assert len(mixed) == 4 and max(mixed.values()) < 26
    found = texts(tmp_path / "set")
    assert sorted(found) == sorted(f"{part}.{row}" for part in range(4) for row in range(100))
    neighbours = sum(a.split(".")[0] == b.split(".")[0] for a, b in pairwise(found))
    assert 60 < neighbours < 140


def test_shards_keep_to_bytes_and_samples(tmp_path):
    raw = Rows(content=(tuple(("x" * (5000 if row == 3 else 100), None) for row in range(40)),))
    manifest = pack(raw, PackOptions(out=tmp_path / "set", samples_per_shard=7, shard_bytes=16 * 1024))
    assert max(shard.bytes for shard in manifest.shards if shard.num_samples > 1) <= 16 * 1024
    assert 1 < max(shard.num_samples for shard in manifest.shards) <= 7
    one_each = pack(raw, PackOptions(out=tmp_path / "small", shard_bytes=1))
    assert len(one_each.shards) == one_each.num_samples == 40


def test_a_limit_takes_the_first_rows_whatever_the_parts(tmp_path):
    rows = [("bad" if number % 5 == 0 else str(number), None) for number in range(60)]
    expected = sorted(text for text, _ in rows[:23] if text != "bad")
    for name, cuts in (("a", [0, 60]), ("b", [0, 10, 20, 22, 40, 60]), ("c", list(range(0, 61, 1)))):
        raw = Rows(content=tuple(tuple(rows[i:j]) for i, j in pairwise(cuts)))
        manifest = pack(raw, PackOptions(out=tmp_path / name, limit=23))
        assert sorted(texts(tmp_path / name)) == expected
        assert (manifest.extra["read"], manifest.extra["skipped"]) == (23, {"bad_row": 5})


def test_invalid_rows_duplicates_and_repeated_ids_are_accounted_for(jsonl, tmp_path, capsys):
    manifest = packed(jsonl, tmp_path / "set")
    # Numbers 50 to 59 have the images of 0 to 9, and 7 has lost its own.
    assert manifest.extra["pictures"] == {"stored": 59, "distinct": 50, "in_several_samples": 9}
    assert manifest.extra["skipped"] == {"missing_image": 1}
    raw = Rows(content=((("a", "x"), ("bad", None), ("b", "y")), (("c", "x"), ("d", "z"), ("e", "x"))))
    manifest = pack(raw, PackOptions(out=tmp_path / "ids"))
    report = json.loads((tmp_path / "ids" / "report.json").read_text())
    assert report["repeated_ids"] == {"samples": 2, "first": [{"part": "part 1", "id": "x"}] * 2}
    assert report["problems"] == [{"part": "part 0", "row": 1, "reason": "bad_row", "message": "part 0, row 1: bad"}]
    assert manifest.extra["skipped_first"] == {"bad_row": ["part 0, row 1: bad"]}
    print_yield(manifest)
    out = capsys.readouterr().out
    for line in ("5 samples in 1 shards", "read: 6 rows", "skipped: 1 (bad_row)", "repeated ids: 2"):
        assert line in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x"), ("bad", None)], "part 0, row 1: bad"),
        ([("a", "x"), ("b", "x")], "part 0: id 'x' is already used by an earlier row"),
    ],
)
def test_strict_stops_at_the_first_problem_and_leaves_nothing(tmp_path, rows, message):
    with pytest.raises(SampleError, match=message):
        pack(Rows(content=(tuple(rows),)), PackOptions(out=tmp_path / "set", strict=True))
    assert list((tmp_path / "set").iterdir()) == []


def test_the_first_invalid_row_is_named_with_several_processes_too(jsonl, tmp_path):
    with pytest.raises(SampleError, match=r"train\.jsonl, line 8: .*none\.png"):
        packed(jsonl, tmp_path / "set", strict=True, workers=2)


def test_what_the_normal_form_does_not_allow_is_an_invalid_row(tmp_path):
    @dataclass(frozen=True)
    class Wrong(Rows):
        def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
            good = record("fine")
            yield SourceSample(record=good, images=[])
            yield SourceSample(record={"messages": []}, images=[])
            yield SourceSample(record=record("one", images=1), images=[])
            yield SourceSample(record=record("half a pair \ud800"), images=[])
            yield SourceSample(record=record("x", images=1), images=[(b"no picture", "png")])
            yield SourceSample(record=record("x", images=1), images=[(tmp_path / "none.png", "png")])
            yield SourceSample(record=good | {"meta": {"object": object()}}, images=[])

    manifest = pack(Wrong(content=((),)), PackOptions(out=tmp_path / "set"))
    assert manifest.extra["skipped"] == {
        "bad_json": 2,
        "invalid_sample": 1,
        "missing_image": 1,
        "placeholder_count": 1,
        "undecodable_image": 1,
    }
    assert texts(tmp_path / "set") == ["fine"]


def test_too_small_a_disk_is_said_before_anything_is_written(jsonl, tmp_path, monkeypatch):
    needed = jsonl.input_bytes() + 60 * 1536 + jsonl.spool_bytes() + 8 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, needed - 1))
    with pytest.raises(DataError, match=rf"no space .*: {needed} bytes needed, {needed - 1} free"):
        packed(jsonl, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    # What was estimated is there, but the plan finds that the shards need more: what was read is kept.
    monkeypatch.setattr(JsonlData, "input_bytes", lambda self: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, 8 * 2**20 + 120_000))
    with pytest.raises(DataError, match=r"no space .*: \d+ bytes needed"):
        packed(jsonl, tmp_path / "set")
    monkeypatch.undo()
    before = (tmp_path / "set/.prepare/spool/000000.bin").stat().st_mtime_ns
    monkeypatch.setattr(WorkFolder, "remove", WorkFolder.close)
    assert packed(jsonl, tmp_path / "set").num_samples == 59
    assert (tmp_path / "set/.prepare/spool/000000.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("call", [2, 8])
def test_a_disk_that_fills_leaves_nothing_that_looks_whole_and_is_resumed(tmp_path, monkeypatch, call):
    raw = Rows(content=((("a", None), ("b", None)), (("c", None),)))
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="no space left; free space"):
        pack(raw, PackOptions(out=tmp_path / "set", samples_per_shard=1))
    assert not list((tmp_path / "set").glob("*.tar"))
    monkeypatch.undo()
    assert pack(raw, PackOptions(out=tmp_path / "set", samples_per_shard=1)).num_samples == 3


def test_an_unreadable_file_is_not_reported_as_a_full_disk(tmp_path):
    @dataclass(frozen=True)
    class Unreadable(Rows):
        def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
            yield from super().read(part)
            raise FileNotFoundError(2, "No such file", "rows.parquet")

    with pytest.raises(DataError, match=r"part 0 cannot be read .*rows\.parquet"):
        pack(Unreadable(content=((("a", None),),)), PackOptions(out=tmp_path / "set"))


def test_a_finished_dataset_is_only_replaced_when_allowed(jsonl, tmp_path):
    pack(Rows(content=((("a", None),),)), PackOptions(out=tmp_path / "set", name="old"))
    with pytest.raises(DataError, match="already holds a finished dataset"):
        packed(jsonl, tmp_path / "set")
    packed(jsonl, tmp_path / "set", overwrite=True)
    assert not list((tmp_path / "set").glob("old*"))


def test_a_dataset_whose_replacement_was_interrupted_is_not_the_new_one(jsonl, tmp_path, monkeypatch):
    pack(Rows(content=((("a", None),),)), PackOptions(out=tmp_path / "set", name="set"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # Whatever of the old dataset is still there, the next run must make the new one.
    for place in ("datamodules.prepare.pack.engine._clear", "datamodules.prepare.pack.engine.Engine._pack"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                packed(jsonl, tmp_path / "set", overwrite=True)
    assert packed(jsonl, tmp_path / "set", overwrite=True).num_samples == 59


def test_the_input_is_never_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set-00000.tar").write_bytes(b"input")
    raw = Rows(content=((("a", None),),), name=str(tmp_path / "set" / "set-00000.tar"))
    with pytest.raises(ConfigError, match=r"holds the input set-00000\.tar"):
        pack(raw, PackOptions(out=tmp_path / "set"))
    assert (tmp_path / "set" / "set-00000.tar").read_bytes() == b"input"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a.b"}, "name of the dataset"),
        ({"samples_per_shard": 0}, "--samples-per-shard: expected 1 or more, found 0"),
        ({"limit": -1}, "--limit: expected 1 or more, found -1"),
        ({"drop_overlap": True}, "--drop-overlap needs --overlap-with"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        PackOptions(out=tmp_path / "set", **options)


@pytest.mark.slow
def test_the_plan_of_a_million_samples_takes_little_memory(tmp_path):
    count, parts = 250_000, 4
    random = np.random.default_rng(0)
    work = WorkFolder(tmp_path)
    work.spool.mkdir(parents=True)
    for number in range(parts):
        rows = np.zeros(count, dtype=ROW)
        rows["order"] = random.integers(0, 2**64, count, dtype=np.uint64)
        rows["part"], rows["size"], rows["length"] = number, 3072, 1500
        rows["offset"] = np.arange(count) * 1500
        np.save(work.part_file(number, "rows.npy"), rows)
    del rows
    tracemalloc.start()
    rows = work.load_parts(range(parts), "rows.npy")
    plan = make_plan(rows, samples_per_shard=5000, shard_bytes=512 * 2**20)
    peak = tracemalloc.get_traced_memory()[1] / (count * parts)
    tracemalloc.stop()
    assert peak < 80  # bytes a sample: 10 million in 0.8 GB
    assert len(plan) == 200
    places = np.concatenate([shard.places for shard in plan])
    assert len(np.unique(places)) == count * parts
    assert np.bincount(places["part"][:5000]).min() > 1000


def test_repeats_are_found_where_they_come_again():
    ids = np.array([5, 0, 7, 5, 0, 7, 7, 9], dtype=np.uint64)
    assert repeated_positions(ids).tolist() == [3, 5, 6]
    assert repeated_positions(ids[:0]).tolist() == []
