"""Members of a tar that can belong to no sample, stand apart, have dots in their names, or lie in a compressed tar.

Sources: OpenNeuro#2520, fuse PR mfusepy#27, ray-project/ray#65044 (hidden members); webdataset/webdataset#11 and #237,
huggingface/datasets#6880 (order and names of members); cvdfoundation/kinetics-dataset#21 (compressed tars).
"""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import AlignVLMError
from datamodules.prepare.index import index_shards
from datamodules.prepare.pack.overlap import read_benchmark_images
from datamodules.shards.manifest import Location, load_manifest
from datamodules.shards.reader import ShardReader, is_no_image, read_range
from datamodules.shards.sample_formats import CaptionReader, read_docdownstream
from datamodules.shards.verify import Verification
from tests.unit.reading import command
from tests.unit.tar_files import write_tar

cc12m, folder = map(command, ("cc12m", "folder"))

KEYS = [f"{number:09d}" for number in range(6)]


def image(shade=9):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def files(key):
    return [(f"{key}.jpg", image(int(key) * 9)), (f"{key}.txt", f"caption {key}".encode())]


def from_a_mac():
    """Each file after its companion, as bsdtar of macOS writes it, with files of other systems between them."""
    yield "./._.", b"\0\5\x16\7"
    yield "./.DS_Store", b"\0\0\0\1Bud1"
    for key in KEYS:
        for name, data in files(key):
            yield f"./._{name}", b"\0\5\x16\7" + bytes(160)
            yield f"./{name}", data
            yield f"./.nfs0000{name}", b"left"
    yield "./__MACOSX/000000001.jpg", b"\0\5\x16\7"
    yield "./Thumbs.db", b"\xd0\xcf\x11\xe0"


def test_prepare_reads_all_pairs_of_a_tar_from_a_mac(tmp_path):
    write_tar(tmp_path / "in.tar", from_a_mac())
    (tmp_path / "._in.tar").write_bytes(b"\0\5\x16\7")
    assert cc12m([str(tmp_path), str(tmp_path / "out"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["written"], report["skipped"]) == (6, 6, {})


def test_index_stream_and_verify_agree_on_a_tar_from_a_mac(tmp_path):
    write_tar(tmp_path / "00000.tar", from_a_mac())
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7")
    manifest = index_shards(tmp_path, format="captions")
    assert (manifest.num_samples, manifest.extra) == (6, {})
    reader, shard = CaptionReader(prompt=""), manifest.shards[0]
    streamed = list(read_range(load_manifest(tmp_path)))
    assert [sample["txt"].decode()[-9:] for sample in streamed] == KEYS
    located = ShardReader()
    for number, key in enumerate(KEYS):
        raw = located.read(Location(manifest=manifest, shard=shard, number=number))
        assert raw["txt"].decode() == f"caption {key}"
    assert list(Verification(adapter=reader)(tmp_path)) == []


def by_ending():
    return [file for ending in ("jpg", "txt") for key in KEYS for file in files(key) if file[0].endswith(ending)]


def test_members_that_stand_apart_are_named_as_the_cause(tmp_path):
    write_tar(tmp_path / "00000.tar", by_ending())
    apart = r"members of sample '.*000000000' stand apart \(jpg, and txt at byte \d+\).*--sort=name"
    with pytest.raises(AlignVLMError, match=apart):
        cc12m([str(tmp_path / "00000.tar"), str(tmp_path / "out"), "--workers", "1"])
    with pytest.raises(AlignVLMError, match=apart):
        index_shards(tmp_path)


def test_one_sample_apart_is_counted_and_the_others_are_kept(tmp_path):
    members = [file for key in KEYS for file in files(key)]
    members.append(members.pop(1))
    write_tar(tmp_path / "in.tar", members)
    assert cc12m([str(tmp_path / "in.tar"), str(tmp_path / "out"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["written"] == 5 and report["skipped"] == {"empty_caption": 1, "members_apart": 1}


def test_dots_in_names_are_named_as_the_cause(tmp_path):
    pages = [f"scan_22.{number:02d}.{ending}" for number in range(6) for ending in ("jpg", "txt")]
    write_tar(tmp_path / "00000.tar", [(name, image() if name.endswith("jpg") else b"text") for name in pages])
    cause = "names are cut at their first dot: 6 images share the key '.*scan_22'"
    with pytest.raises(AlignVLMError, match=cause):
        cc12m([str(tmp_path / "00000.tar"), str(tmp_path / "out"), "--workers", "1"])
    with pytest.raises(AlignVLMError, match=cause):
        index_shards(tmp_path)


@pytest.mark.parametrize(
    ("kind", "ending", "pack"),
    [
        ("gzip", ".gz", gzip.compress),
        ("bzip2", ".bz2", bz2.compress),
        ("xz", ".xz", lzma.compress),
        ("zstd", ".zst", lambda data: b"\x28\xb5\x2f\xfd" + data),
    ],
)
def test_a_compressed_tar_is_named_by_content_and_by_name(tmp_path, kind, ending, pack):
    plain = write_tar(tmp_path / "plain", [file for key in KEYS for file in files(key)])
    for name in ("00000.tar", f"00000.tar{ending}"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(pack(plain.read_bytes()))
        for read in (
            lambda folder=folder: cc12m([str(folder), str(tmp_path / "out"), "--workers", "1"]),
            lambda folder=folder: index_shards(folder),
        ):
            with pytest.raises(AlignVLMError, match=rf"is {kind}.*unpack it first") as raised:
                read()
            assert "again" not in str(raised.value)


@pytest.mark.parametrize("padding", [0, 1, 300])
@pytest.mark.parametrize("last", ["1.jpg", "._1.jpg"])
def test_a_tar_cut_in_the_padding_of_a_member_is_cut(tmp_path, last, padding):
    path = write_tar(tmp_path / "00000.tar", [*files(KEYS[0]), (last, b"x")])
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end + bytes(padding))
    for read in (lambda: cc12m([str(path), str(tmp_path / "out"), "--workers", "1"]), lambda: index_shards(tmp_path)):
        with pytest.raises(AlignVLMError, match=rf"at byte {path.stat().st_size}, .*cut_at_member.* again"):
            read()


STRAY = {
    "a hidden folder": ".ipynb_checkpoints/00000.jpg",
    "a hidden folder below": "./.thumbs/x.jpg",
    "a text about the dataset": "README.md",
    "a text with the ending of captions": "LICENSE.txt",
    "a page": "index.html",
    "a table": "notes.csv",
}


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_stray_members_split_no_sample(tmp_path, stray, place):
    members = [file for key in KEYS[:2] for file in files(key)]
    members.insert(place, (STRAY[stray], b"stray"))
    write_tar(tmp_path / "00000.tar", members)
    manifest = index_shards(tmp_path)
    assert (manifest.num_samples, manifest.extra) == (2, {})
    located, shard = ShardReader(), manifest.shards[0]
    for number, sample in enumerate(read_range(load_manifest(tmp_path))):
        raw = located.read(Location(manifest=manifest, shard=shard, number=number))
        assert set(sample) == set(raw) == {"__key__", "__url__", "jpg", "txt"}
    assert list(Verification(adapter=CaptionReader(prompt=""))(tmp_path)) == []
    assert cc12m([str(tmp_path), str(tmp_path / "out"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["written"], report["skipped"]) == (2, 2, {})


def test_hidden_folders_hold_no_files_of_a_dataset(tmp_path):
    root = tmp_path / ".data"
    for place in (root, root / ".ipynb_checkpoints"):
        place.mkdir()
        (place / "a.png").write_bytes(image())
        (place / "a.txt").write_text("text")
        write_tar(place / "a.tar", files(KEYS[0]))
    for converter, name in ((cc12m, "tars"), (folder, "folder")):
        assert converter([str(root), str(tmp_path / name), "--workers", "1"]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["read"], report["written"]) == (1, 1)


ENDINGS = {"tif": "TIFF", "gif": "GIF", "bmp": "BMP", "jpe": "JPEG", "jfif": "JPEG", "tiff": "TIFF"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_images_of_a_tar_have_the_endings_of_images_elsewhere(tmp_path, ending):
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, ENDINGS[ending])
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.{ending}", buffer.getvalue()), (f"{number}.txt", b"text")])
    manifest = index_shards(tmp_path, format="captions")
    assert (manifest.num_samples, manifest.extra) == (2, {})
    raw = ShardReader().read(Location(manifest=manifest, shard=manifest.shards[0], number=0), wanted=is_no_image)
    assert raw[ending] == b""
    (tmp_path / "known").mkdir()
    read_benchmark_images([tmp_path], tmp_path / "known")
    assert len(np.load(tmp_path / "known" / "known.names.npy")) == 2
    assert cc12m([str(tmp_path), str(tmp_path / "out"), "--workers", "1"]) == 0
    turns = [{"role": "user", "content": "<|image|>x"}, {"role": "assistant", "content": "y"}]
    raw = {"__key__": "k", "__url__": "u", "json": json.dumps({"messages": turns}).encode()}
    for name in (ending, f"0.{ending}"):
        assert read_docdownstream(raw | {name: b"x"})[2] == [name]
