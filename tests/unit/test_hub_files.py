"""A dataset of the hub through huggingface_hub's own client: parquet files and tars, fetched one by one."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample import message_text
from tests.unit.hub_server import Hub, prepare, serving

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as server:
        yield server


def write(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(buffer, "PNG")
        image_file = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"sample_id": f"{path.stem}/{number}", "image": image_file, "query": ["q"], "annotations": ["a"]})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=count // 2)


def test_a_config_of_a_hub_dataset_is_fetched_and_nothing_is_kept(tmp_path, hub):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001"):
        write(hub.root / f"ArxivTableCap/{name}.parquet", 40)
    write(hub.root / "ArxivOCR/train-00000-of-00001.parquet", 2)
    done = prepare(hub, tmp_path / "out", "--config", "ArxivTableCap")
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").sources == {"bigdocs/ArxivTableCap": 80}
    fetched = [(path, given) for path, given in hub.requested if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path, _ in fetched} == {
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    }  # fmt: skip
    assert not (tmp_path / "out/.prepare").exists()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 10_000]


def test_tars_of_a_hub_dataset_are_fetched_through_a_failing_request(tmp_path, hub):
    (hub.root / "data").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(hub.root / f"data/cc12m-train-{shard:04d}.tar", "w") as tar:
            for key in range(30):
                buffer = io.BytesIO()
                Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(buffer, "PNG")
                for ending, data in (("png", buffer.getvalue()), ("txt", f"{shard}/{key}".encode())):
                    info = tarfile.TarInfo(f"{key:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    hub.failing = 1
    done = prepare(hub, tmp_path / "out", kind="cc12m")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.num_samples, manifest.extra["skipped"], hub.failing) == (60, {}, 0)
    answers = {message_text(Decoder()(raw).messages[-1]) for raw in read_range(manifest, 0, 60)}
    assert answers == {f"{shard}/{key}" for shard in range(2) for key in range(30)}
    fetched = [(path, given) for path, given in hub.requested if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path, _ in fetched} == {
        "cc12m-train-0000.tar",
        "cc12m-train-0001.tar",
    }
    assert not (tmp_path / "out/.prepare").exists()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 10_000]


def test_what_a_hub_dataset_lacks_is_named(tmp_path, hub):
    write(hub.root / "ArxivTableCap/val-00000-of-00001.parquet", 2)
    write(hub.root / "ArxivOCR/train-00000-of-00001.parquet", 2)
    done = prepare(hub, tmp_path / "out", "--config", "ArxivTableCap")
    assert done.returncode != 0
    assert "no files of split 'train'" in done.stderr
    assert "Traceback" not in done.stderr
