"""Shards -> raw samples by place and in order; every sample once; damage is never silent."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.loading.eval_batches import plan_evaluation
from datamodules.shards.manifest import Manifest, load_manifest
from datamodules.shards.reader import ShardReader, is_no_image, read_range
from datamodules.shards.writer import ShardWriter
from datamodules.stream.stream import Location, Source, TrainStream


def make_set(folder: Path, *, num_samples: int, samples_per_shard: int, name: str = "set") -> Manifest:
    """Samples of text only; the key of number 7 is `set-00000007`."""
    turn = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    with ShardWriter(folder, name=name, source="made", license="CC0-1.0", samples_per_shard=samples_per_shard) as out:
        for _ in range(num_samples):
            out.add({"messages": [turn]}, [], [])
    return load_manifest(folder)


def stream(*manifests: Manifest, seed: str = "0", buffer: int = 8, **options: Any) -> TrainStream:
    return TrainStream(sources=(Source(name="train", manifests=manifests, **options),), seed=seed, buffer=buffer)


def epoch_keys(found: TrainStream, epoch: int = 0) -> list[str]:
    reader = ShardReader()
    positions = range(epoch * len(found), (epoch + 1) * len(found))
    return [reader.read(found.locate(position))["__key__"] for position in positions]


def every_location(manifest: Manifest) -> list[Location]:
    return [
        Location(manifest=manifest, shard=shard, number=number)
        for shard in manifest.shards
        for number in range(shard.num_samples)
    ]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Manifest:
    """22 samples in shards of 4, the last with 2."""
    return make_set(tmp_path_factory.mktemp("uneven"), num_samples=22, samples_per_shard=4)


@pytest.mark.parametrize("epoch", [0, 3])
def test_each_sample_once_an_epoch(uneven, epoch):
    assert sorted(epoch_keys(stream(uneven), epoch)) == [f"set-{number:08d}" for number in range(22)]


def test_several_datasets_are_concatenated(uneven, tmp_path):
    second = make_set(tmp_path, num_samples=5, samples_per_shard=5, name="second")
    keys = epoch_keys(stream(uneven, second))
    assert len(set(keys)) == 27
    assert sum(key.startswith("second-") for key in keys) == 5


def test_a_mixture_repeats_its_small_source_sooner(uneven, tmp_path):
    second = make_set(tmp_path, num_samples=5, samples_per_shard=2, name="second")
    found = TrainStream(
        sources=(
            Source(name="large", manifests=(uneven,), weight=2),
            Source(name="small", manifests=(second,), weight=1),
        ),
        seed="0",
        buffer=8,
    )
    reader = ShardReader()
    keys = [reader.read(found.locate(position))["__key__"] for position in range(90)]
    small = [key for key in keys if key.startswith("second-")]
    assert len(small) == pytest.approx(30, abs=10)
    assert all(len(set(small[at : at + 5])) == 5 for at in range(0, len(small) - 4, 5))
    epoch, at = divmod(len(small), 5)
    assert found.progress(90)["small"] == {"epoch": epoch, "position": at}


def test_only_the_wanted_sources_are_in_the_stream(tmp_path):
    turn = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    with ShardWriter(tmp_path, name="set", source="a", license="CC0-1.0", samples_per_shard=3) as out:
        for source in "abcabbbb":
            out.add({"messages": [turn], "source": source}, [], [])
    found = stream(load_manifest(tmp_path), only=frozenset("ac"))
    assert sorted(key[-1] for key in epoch_keys(found)) == ["0", "2", "3"]
    with pytest.raises(DataError, match="no sample of d in the training datasets"):
        len(stream(load_manifest(tmp_path), only=frozenset("d")))


def test_stream_and_reader_travel_to_spawned_workers(uneven):
    found, reader = stream(uneven), ShardReader()
    reader.read(found.locate(0))
    copy, other = pickle.loads(pickle.dumps((found, reader)))
    assert other.read(copy.locate(7)) == reader.read(found.locate(7))


def test_a_sample_by_its_place_is_the_one_read_in_order(uneven):
    reader = ShardReader()
    for location, raw in zip(every_location(uneven), read_range(uneven, 0, 22), strict=True):
        assert reader.read(location) == raw


def test_a_sample_can_be_read_without_its_images(tmp_path):
    turn = {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "?"}]}
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5)).save(buffer, "PNG")
    with ShardWriter(tmp_path, name="set", source="made", license="CC0-1.0") as out:
        out.add({"messages": [turn]}, [buffer.getvalue()], ["png"])
    (location,) = every_location(load_manifest(tmp_path))
    raw = ShardReader().read(location, wanted=is_no_image)
    assert raw["0.png"] == b""
    assert raw["json"] == ShardReader().read(location)["json"]
    assert ShardReader().row(location).sizes == ((7, 5),)
    assert ShardReader().row(location).source == "made"


def test_more_shards_than_may_be_open(tmp_path):
    manifest = make_set(tmp_path, num_samples=80, samples_per_shard=1)
    reader = ShardReader()
    keys = [reader.read(location)["__key__"] for location in [*every_location(manifest)] * 2]
    assert keys == [f"set-{number:08d}" for number in range(80)] * 2
    assert len(reader._shards) == 32


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"\xff" * 512, "broken header"),
        (0, bytes(512), "a header of zeros"),
        (0, None, "found set-00000001 in its place"),
        (124, b"00000000777", "the file ends inside this member|broken header"),
    ],
)
def test_damage_of_a_sample_is_never_another_sample(tmp_path, at, content, message):
    manifest = make_set(tmp_path, num_samples=4, samples_per_shard=4)
    path = tmp_path / "set-00000.tar"
    data = bytearray(path.read_bytes())
    first, second = 0, data.index(b"set-00000001.json")
    content = bytes(data[second : 2 * second]) if content is None else content
    data[first + at : first + at + len(content)] = content
    path.write_bytes(data)
    locations = every_location(manifest)
    with pytest.raises(DataError, match=rf"set-00000\.tar is damaged at sample 0 of 4, byte 0 \(.*({message})"):
        ShardReader().read(locations[0])
    assert ShardReader().read(locations[2])["__key__"] == "set-00000002"


def test_a_shard_that_grew_or_went_is_named(tmp_path):
    manifest = make_set(tmp_path, num_samples=4, samples_per_shard=2)
    first, *_, last = every_location(manifest)
    with (tmp_path / "set-00000.tar").open("ab") as stream:
        stream.write(bytes(512))
    (tmp_path / "set-00001.tar").unlink()
    with pytest.raises(DataError, match=r"set-00000\.tar is changed: expected \d+ bytes, found"):
        ShardReader().read(first)
    with pytest.raises(DataError, match=r"set-00001\.tar is missing"):
        ShardReader().read(last)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 12])
def test_evaluation_has_each_sample_once_and_as_many_batches_on_all_ranks(world, num_samples):
    positions = [3 * index + 1 for index in range(num_samples)]  # with gaps, as a killed run leaves them
    plans = [plan_evaluation(positions, batch_size=3, rank=rank, world_size=world) for rank in range(world)]
    assert sorted(position for plan in plans for part in plan for position in part) == positions
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(part) <= 3 for plan in plans for part in plan)


def test_a_rank_without_samples_gets_a_filler():
    assert plan_evaluation([5], batch_size=4, rank=0, world_size=2) == [()]
    assert plan_evaluation([5], batch_size=4, rank=1, world_size=2) == [(5,)]
    assert plan_evaluation([], batch_size=4, rank=1, world_size=2) == [()]


def test_a_range_opens_only_the_shards_it_needs(tmp_path):
    manifest = make_set(tmp_path, num_samples=9, samples_per_shard=3)
    (tmp_path / "set-00000.tar").unlink()
    keys = [sample["__key__"] for sample in read_range(manifest, 4, 8)]
    assert keys == ["set-00000004", "set-00000005", "set-00000006", "set-00000007"]


def damaged(folder: Path, *, keep_size: bool, at: int, fill: bytes = b"\xff") -> Manifest:
    """Cut the only shard at a byte, or fill the rest so that the size stays."""
    manifest = make_set(folder, num_samples=4, samples_per_shard=4)
    path = folder / "set-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:at] + (fill * (len(data) - at) if keep_size else b""))
    return manifest


@pytest.mark.parametrize("at", [0, 100, 700, 1024, 1536, 3072])
def test_a_cut_shard_is_named_wherever_it_was_cut(tmp_path, at):
    # A sample is a header block and a data block, so 1024 and 3072 are member boundaries.
    manifest = damaged(tmp_path, keep_size=False, at=at)
    with pytest.raises(DataError, match=rf"set-00000\.tar is truncated: expected \d+ bytes, found {at}"):
        list(read_range(manifest))


@pytest.mark.parametrize(("at", "number"), [(1024, 1), (3072, 3)])
def test_a_shard_that_ends_silently_is_found_by_its_index(tmp_path, at, number):
    manifest = damaged(tmp_path, keep_size=True, at=at, fill=b"\0")
    with pytest.raises(DataError, match=rf"set-00000\.tar is damaged at sample {number} of 4, byte {at}"):
        list(read_range(manifest))


def test_a_broken_header_is_named_with_its_byte(tmp_path):
    manifest = damaged(tmp_path, keep_size=True, at=3072)
    with pytest.raises(DataError, match=r"damaged at sample 3 of 4, byte 3072 \(byte 3072: broken header"):
        list(read_range(manifest))


def test_a_shard_that_is_no_tar_is_named(tmp_path):
    manifest = damaged(tmp_path, keep_size=True, at=0)
    with pytest.raises(DataError, match=r"set-00000\.tar is damaged at sample 0 of 4, byte 0 \("):
        list(read_range(manifest))


def test_a_field_that_is_there_twice_is_an_error(tmp_path):
    manifest = make_set(tmp_path, num_samples=1, samples_per_shard=1)
    path = tmp_path / "set-00000.tar"
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.json"))
    assert path.stat().st_size == size
    with pytest.raises(DataError, match=r"duplicate file name in tar"):
        list(read_range(manifest))
