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
from datamodules.prepare.cc12m import CaptionTars
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.pack import processes, spool
from datamodules.prepare.pack.engine import Engine, pack, print_yield
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.pack.plan import make_plan, repeated_positions
from datamodules.prepare.pack.processes import run_jobs
from datamodules.prepare.pack.spool import ROW
from datamodules.prepare.pack.work_folder import WorkFolder
from datamodules.prepare.sources.source import SourceSample
from datamodules.shards.index import load_index
from datamodules.shards.manifest import Manifest, load_manifest, verify_shard
from datamodules.shards.reader import read_range
from datamodules.shards.sample import SampleError
from datamodules.shards.verify import Verification


def record(text: str, images: int = 0, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image", "index": index} for index in range(images)]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"messages": [turn, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], **fields}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Raw data of text; a row is (text, id or None, source); a text `bad` is an invalid row, `none` an unwanted one."""

    content: tuple[tuple[str, str | None, str], ...]
    name: str = "rows"
    source: str = "made"
    license: str = "CC0-1.0"
    files: tuple[Path, ...] = ()

    def inputs(self) -> tuple[Path, ...]:
        return self.files

    def num_rows(self) -> int:
        return len(self.content)

    def parts(self) -> list[int]:
        return [0, 7]

    def rows(self, part: int) -> Iterator[Any]:
        for number, row in list(enumerate(self.content))[part : None if part else 7]:
            yield SampleError(f"row {number}: bad", "bad_row") if row[0] == "bad" else row

    def sample(self, row: Any) -> SourceSample | None:
        text, given, source = row
        fields = {"source": source} | ({} if given is None else {"id": given})
        return None if text == "none" else SourceSample(record=record(text, **fields), images=[], where=text)


def plain(*texts: str) -> Rows:
    return Rows(content=tuple((text, None, "made") for text in texts))


def texts(folder: Path) -> list[str]:
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        verify_shard(manifest.shard_path(shard), shard, verify_sha256=True)
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
    return JsonlData(path=path, image_root=tmp_path / "raw", source="set")


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
    raw = Rows(content=tuple((f"{part}.{row}", None, f"part {part}") for part in range(4) for row in range(100)))
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
    raw = plain(*("x" * (5000 if row == 3 else 100) for row in range(40)))
    manifest = pack(raw, PackOptions(out=tmp_path / "set", samples_per_shard=7, shard_bytes=16 * 1024))
    assert max(shard.bytes for shard in manifest.shards if shard.num_samples > 1) <= 16 * 1024
    assert 1 < max(shard.num_samples for shard in manifest.shards) <= 7
    one_each = pack(raw, PackOptions(out=tmp_path / "small", shard_bytes=1))
    assert len(one_each.shards) == one_each.num_samples == 40


def test_a_limit_takes_the_first_rows_that_are_wanted(tmp_path, monkeypatch):
    rows = ["none" if number % 7 == 0 else "bad" if number % 5 == 0 else str(number) for number in range(60)]
    wanted = [text for text in rows if text != "none"][:23]
    for name, samples in (("a", 4096), ("b", 3), ("c", 18)):
        monkeypatch.setattr(spool, "TAR_SAMPLES", samples)
        manifest = pack(plain(*rows), PackOptions(out=tmp_path / name, limit=23))
        assert sorted(texts(tmp_path / name)) == sorted(text for text in wanted if text != "bad")
        assert (manifest.extra["read"], manifest.extra["skipped"]) == (23, {"bad_row": wanted.count("bad")})


def test_invalid_rows_duplicates_and_repeated_ids_are_accounted_for(jsonl, tmp_path, capsys):
    manifest = packed(jsonl, tmp_path / "set")
    # Numbers 50 to 59 have the images of 0 to 9, and 7 has lost its own.
    assert manifest.extra["pictures"] == {"stored": 59, "distinct": 50, "in_several_samples": 9}
    assert manifest.extra["skipped"] == {"missing_image": 1}
    rows = [("a", "x"), ("bad", None), ("b", "y"), ("c", "x"), ("d", "z"), ("e", "x")]
    raw = Rows(content=tuple((*row, "made") for row in rows))
    manifest = pack(raw, PackOptions(out=tmp_path / "ids"))
    report = json.loads((tmp_path / "ids" / "report.json").read_text())
    assert report["repeated_ids"] == {"samples": 2, "first": [{"row": row, "id": "x"} for row in (3, 5)]}
    assert report["problems"] == [{"row": 1, "reason": "bad_row", "message": "row 1: bad"}]
    assert manifest.extra["skipped_first"] == {"bad_row": ["row 1: bad"]}
    print_yield(manifest)
    out = capsys.readouterr().out
    for line in ("5 samples in 1 shards", "read: 6 rows", "skipped: 1 (bad_row)", "repeated ids: 2"):
        assert line in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x"), ("bad", None)], "row 1: bad"),
        ([("a", "x"), ("b", "x")], "rows, row 1: id 'x' is already used by an earlier row"),
    ],
)
def test_strict_stops_at_the_first_problem_and_leaves_nothing(tmp_path, rows, message):
    raw = Rows(content=tuple((*row, "made") for row in rows))
    with pytest.raises(SampleError, match=message):
        pack(raw, PackOptions(out=tmp_path / "set", strict=True))
    assert list((tmp_path / "set").iterdir()) == []


def test_the_first_invalid_row_is_named_with_several_processes_too(jsonl, tmp_path):
    with pytest.raises(SampleError, match=r"train\.jsonl, line 8: .*none\.png"):
        packed(jsonl, tmp_path / "set", strict=True, workers=2)


def test_what_the_normal_form_does_not_allow_is_an_invalid_row(tmp_path):
    @dataclass(frozen=True)
    class Wrong(Rows):
        def parts(self) -> list[int]:
            return [0]

        def rows(self, part: int) -> Iterator[Any]:
            good = record("fine")
            yield good, []
            yield {"messages": []}, []
            yield record("one", images=1), []
            yield record("half a pair \ud800"), []
            yield record("x", images=1), [(b"no picture", "png")]
            yield good | {"meta": {"object": object()}}, []

        def sample(self, row: Any) -> SourceSample:
            return SourceSample(record=row[0], images=row[1], where="here")

    manifest = pack(Wrong(content=()), PackOptions(out=tmp_path / "set"))
    assert manifest.extra["skipped"] == {
        "bad_json": 2,
        "invalid_sample": 1,
        "placeholder_count": 1,
        "undecodable_image": 1,
    }
    assert texts(tmp_path / "set") == ["fine"]


def test_too_small_a_disk_is_said_before_the_shards_and_what_was_read_is_kept(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, 8 * 2**20 + 120_000))
    with pytest.raises(DataError, match=r"no space .*: \d+ bytes needed"):
        packed(jsonl, tmp_path / "set")
    assert not list((tmp_path / "set").glob("*.tar"))
    monkeypatch.undo()
    before = (tmp_path / "set/.prepare/spool/000000.tar").stat().st_mtime_ns
    monkeypatch.setattr(WorkFolder, "remove", WorkFolder.close)
    assert packed(jsonl, tmp_path / "set").num_samples == 59
    assert (tmp_path / "set/.prepare/spool/000000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize("call", [2, 6])
def test_a_disk_that_fills_leaves_nothing_that_looks_whole_and_is_resumed(tmp_path, monkeypatch, call):
    raw = plain("a", "b", "c")
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


@pytest.mark.slow
def test_no_more_tasks_are_read_than_the_processes_have_ahead():
    """What bounds the memory: rows with their images are read in this process."""
    read: list[int] = []
    results = run_jobs(abs, (read.append(number) or number for number in range(50)), workers=2)
    ahead = [len(read) - got for got, _ in enumerate(results)]
    assert read == list(range(50))
    assert max(ahead) == 2 * processes._AHEAD + 1


@dataclass(frozen=True, kw_only=True)
class Damaged(Rows):
    """Rows of which the part ends in damage."""

    def rows(self, part: int) -> Iterator[Any]:
        yield from super().rows(part)
        raise DataError("damaged here")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_damage_comes_after_the_rows_before_it(tmp_path, workers):
    raw = Damaged(content=tuple((text, None, "made") for text in ("a", "b", "bad", "c")))
    assert pack(raw, PackOptions(out=tmp_path / "limit", limit=2, workers=workers)).num_samples == 2
    with pytest.raises(SampleError, match="row 2: bad"):
        pack(raw, PackOptions(out=tmp_path / "strict", strict=True, workers=workers))
    with pytest.raises(DataError, match="damaged here"):
        pack(raw, PackOptions(out=tmp_path / "all", workers=workers))


def test_a_run_whose_rows_are_all_read_reads_none_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.prepare.pack.engine.Engine._write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(plain("a", "b"), PackOptions(out=tmp_path / "set"))
    monkeypatch.setattr(Rows, "rows", lambda *_: 1 / 0)
    assert pack(plain("a", "b"), PackOptions(out=tmp_path / "set")).num_samples == 2


def test_a_resumed_run_opens_no_part_that_it_has_read(tmp_path, monkeypatch):
    opened: list[int] = []

    def rows(self: Rows, part: int) -> Iterator[Any]:
        opened.append(part)
        yield from self.content[part : part + 4]
        if part == 8 and len(opened) == 3:
            raise DataError("away")

    monkeypatch.setattr(spool, "TAR_SAMPLES", 3)
    monkeypatch.setattr(Rows, "parts", lambda self: [0, 4, 8])
    monkeypatch.setattr(Rows, "rows", rows)
    raw = plain(*(str(number) for number in range(12)))
    with pytest.raises(DataError, match="away"):
        pack(raw, PackOptions(out=tmp_path / "set"))
    (tmp_path / "set/.prepare/spool/000003.json").unlink()  # as if killed before the last of four tars was finished
    (tmp_path / "set/.prepare/spool/000002.json").unlink()
    pack(raw, PackOptions(out=tmp_path / "set"))
    assert sorted(texts(tmp_path / "set"), key=int) == [str(number) for number in range(12)]
    assert opened == [0, 4, 8, 4, 8]  # six rows were kept: all of the first part, two of the second


@pytest.mark.parametrize("damage", ["image", "cut"])
def test_a_damaged_tar_of_the_first_pass_is_named(jsonl, tmp_path, monkeypatch, damage):
    write = Engine._write_shards

    def damaged(self: Engine, plan: Any) -> Any:
        path = tmp_path / "set/.prepare/spool/000000.tar"
        data = path.read_bytes()
        at = data.index(b"\x89PNG") + 40
        path.write_bytes(data[:at] + b"?" + data[at + 1 :] if damage == "image" else data[:at])
        return write(self, plan)

    monkeypatch.setattr(Engine, "_write_shards", damaged)
    with pytest.raises(DataError, match=r"000000\.tar is damaged at byte \d+ .*remove the folder .*\.prepare"):
        packed(jsonl, tmp_path / "set")


def test_a_dataset_that_another_run_has_finished_meanwhile_stays(tmp_path, monkeypatch):
    lock = WorkFolder.lock

    def late(self: WorkFolder) -> None:
        lock(self)
        (tmp_path / "set" / "manifest.json").write_text("{}")

    monkeypatch.setattr(WorkFolder, "lock", late)
    with pytest.raises(DataError, match="already holds a finished dataset"):
        pack(plain("a"), PackOptions(out=tmp_path / "set"))
    assert (tmp_path / "set" / "manifest.json").exists()


def test_the_folder_of_fetched_files_is_no_setting_of_the_data():
    """A run is found again where its output folder is spelled in another way."""
    one, other = (CaptionTars(files=(), fetched=Path(name), prompt="") for name in ("a", "b"))
    assert repr(one) == repr(other)


def test_an_unreadable_file_is_not_reported_as_a_full_disk(tmp_path):
    @dataclass(frozen=True)
    class Unreadable(Rows):
        def rows(self, part: int) -> Iterator[Any]:
            yield from super().rows(part)
            raise FileNotFoundError(2, "No such file", "rows.parquet")

    with pytest.raises(DataError, match=r"rows cannot be read .*rows\.parquet"):
        pack(Unreadable(content=(("a", None, "made"),)), PackOptions(out=tmp_path / "set"))

    @dataclass(frozen=True)
    class Guarded(Rows):
        def sample(self, row: Any) -> SourceSample:
            raise PermissionError(13, "Permission denied", "a.json")

    with pytest.raises(DataError, match=r"rows cannot be read .*a\.json"):
        pack(Guarded(content=(("a", None, "made"),)), PackOptions(out=tmp_path / "other"))


def test_a_finished_dataset_is_only_replaced_when_allowed(jsonl, tmp_path):
    pack(plain("a"), PackOptions(out=tmp_path / "set", name="old"))
    with pytest.raises(DataError, match="already holds a finished dataset"):
        packed(jsonl, tmp_path / "set")
    packed(jsonl, tmp_path / "set", overwrite=True)
    assert not list((tmp_path / "set").glob("old*"))


def test_a_dataset_whose_replacement_was_interrupted_is_not_the_new_one(jsonl, tmp_path, monkeypatch):
    pack(plain("a"), PackOptions(out=tmp_path / "set", name="set"))

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
    raw = Rows(content=(("a", None, "made"),), files=(tmp_path / "set" / "set-00000.tar",))
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
    count, tars = 250_000, 4
    random = np.random.default_rng(0)
    work = WorkFolder(tmp_path)
    work.spool.mkdir(parents=True)
    for number in range(tars):
        rows = np.zeros(count, dtype=ROW)
        rows["order"] = random.integers(0, 2**64, count, dtype=np.uint64)
        rows["tar"], rows["size"] = number, 3072
        rows["offset"] = np.arange(count) * 3072
        np.save(work.spool_file(number, "rows.npy"), rows)
    del rows
    tracemalloc.start()
    rows = work.load_spooled("rows.npy")
    plan = make_plan(rows, samples_per_shard=5000, shard_bytes=512 * 2**20)
    peak = tracemalloc.get_traced_memory()[1] / (count * tars)
    tracemalloc.stop()
    assert peak < 90  # bytes a sample: 10 million in 0.9 GB
    assert len(plan) == 200
    places = np.concatenate([shard.places for shard in plan])
    assert len(np.unique(places)) == count * tars
    assert np.bincount(places["tar"][:5000]).min() > 1000


def test_repeats_are_found_where_they_come_again():
    ids = np.array([5, 0, 7, 5, 0, 7, 7, 9], dtype=np.uint64)
    assert repeated_positions(ids).tolist() == [3, 5, 6]
    assert repeated_positions(ids[:0]).tolist() == []
