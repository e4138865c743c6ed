"""A key twice in a record, a column twice in a header, a member twice in a tar: none of them wins in silence."""

import base64
import json
import re
from pathlib import Path

import pytest

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.errors import DataError
from alignvlm_pl.scoring.files import read_predictions
from alignvlm_pl.scoring.tsv import TabTable
from datamodules.prepare.cc12m import CaptionTars
from datamodules.prepare.docdownstream import DocDownstreamFolder
from datamodules.prepare.folder import SidecarFolder
from datamodules.prepare.index import index_shards
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.llava import LLaVAList
from datamodules.shards.sample import SampleError
from datamodules.shards.sample_formats import CaptionReader, read_bigdocs, read_docdownstream
from datamodules.shards.verify import Verification
from datamodules.storage.stored_files import find_file
from tests.unit.reading import read
from tests.unit.tar_files import write_tar
from tests.unit.test_benchmark_sources import image_file as base64_image

PAIR = [{"from": "human", "value": "Total?"}, {"from": "gpt", "value": "5"}]
GOOD = json.dumps({"id": "a", "conversations": PAIR})
# In the record, and in one of its turns.
TWICE = [
    GOOD[:-1] + f', "conversations": {json.dumps(PAIR[::-1])}}}',
    GOOD.replace('"value": "5"', '"value": "5", "value": "6"'),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def open_sources(folder: Path) -> dict[str, object]:
    rows = [GOOD, *TWICE, GOOD]
    lines, listed = write(folder / "a.jsonl", "\n".join(rows)), write(folder / "a.json", f"[{', '.join(rows)}]")
    return {
        "jsonl": JsonlData(path=lines, image_root=folder, source="a"),
        "jsonl list": JsonlData(path=listed, image_root=folder, source="a"),
        "docdownstream": DocDownstreamFolder(path=lines, image_root=folder),
        "llava": LLaVAList(path=listed, image_root=folder),
    }


@pytest.mark.parametrize("name", ["jsonl", "jsonl list", "docdownstream", "llava"])
def test_a_record_with_a_key_given_twice_is_skipped_alone(tmp_path, name):
    samples, invalid = read(open_sources(tmp_path)[name])
    assert len(samples) == 2
    assert invalid == {"bad_json": 2}


def test_other_json_with_a_key_given_twice(tmp_path):
    (tmp_path / "a.png").write_bytes(base64.b64decode(base64_image(1)))
    write(tmp_path / "a.json", '{"question": "?", "answer": "5", "answer": "6"}')
    samples, invalid = read(SidecarFolder(root=tmp_path, prompt="", name="a", source="a"))
    assert (samples, invalid) == ([], {"bad_json": 1})
    raw = {"__key__": "a", "__url__": "a.tar", "json": b'{"messages": [], "messages": []}'}
    with pytest.raises(SampleError, match="the key 'messages' is given twice"):
        read_docdownstream(raw)
    record = '{"key": "a", "prediction": "5", "prediction": "6", "references": ["5"], "meta": {}}'
    with pytest.raises(DataError, match=r"line 1 \(the key 'prediction' is given twice\)"):
        read_predictions(write(tmp_path / "p.jsonl", record), get_benchmark("docvqa"))
    with pytest.raises(DataError, match="the key 'index' is given twice"):
        read_predictions(write(tmp_path / "p.json", '[{"index": 1, "index": 2}]'), get_benchmark("docvqa"))


def _tsv(path: Path) -> None:
    TabTable(write(path, "index\tanswer\tanswer\n1\ta\tb\n"))


def _xlsx(path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    for row in (("index", "answer", "answer", "prediction"), (1, "a", "b", "c")):
        book.active.append(row)
    book.save(path.with_suffix(".xlsx"))
    read_predictions(path.with_suffix(".xlsx"), get_benchmark("docvqa"))


def _parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    from datamodules.prepare.llava import LLaVARows

    turns = pa.array([PAIR])
    table = pa.table(
        [pa.array(["a"]), turns, pa.array(["x"]), pa.array(["x"])], names=["id", "conversations", "answer", "answer"]
    )
    pq.write_table(table, path)
    LLaVARows(fetched=path.parent, files=(find_file(str(path)),)).num_rows()


@pytest.mark.parametrize("make", [_tsv, _xlsx, _parquet])
def test_a_table_with_a_column_given_twice_is_refused(tmp_path, make):
    with pytest.raises(DataError, match="has the column 'answer' twice"):
        make(tmp_path / "table.tsv")


def test_columns_without_a_name_are_read_by_nobody(tmp_path):
    assert TabTable(write(tmp_path / "a.tsv", "index\tanswer\t\t\n")).header == ["index", "answer", "", ""]


# Members of a tar


IMAGE = base64.b64decode(base64_image(1))
TARS = {
    "repeated_member": [("b.txt", b"two")],
    "repeated_key": [("c.jpg", IMAGE), ("c.txt", b"c"), ("b.jpg", IMAGE), ("b.txt", b"two")],
    "members_apart": [("c.jpg", IMAGE), ("c.txt", b"c"), ("b.json", b"{}")],
}


@pytest.mark.parametrize("kind", TARS)
def test_converter_index_and_verify_find_the_same_in_a_tar(tmp_path, kind):
    pairs = [(f"{key}.{ending}", IMAGE if ending == "jpg" else b"one") for key in "ab" for ending in ("jpg", "txt")]
    write_tar(tmp_path / "0.tar", pairs)
    index_shards(tmp_path, format="captions")
    write_tar(tmp_path / "0.tar", pairs + TARS[kind])
    samples, invalid = read(CaptionTars(files=(find_file(str(tmp_path / "0.tar")),), fetched=tmp_path, prompt="?"))
    assert invalid == {kind: 1}
    # The first of two samples is kept; of a sample with a member twice nobody knows which one is meant.
    assert [sample.record["id"][-1] for sample in samples] == {"repeated_member": ["a"]}.get(kind, ["a", "b", "c"])
    found = [damage for damage in Verification(adapter=CaptionReader(prompt=""))(tmp_path) if damage.kind in TARS]
    assert [damage.kind for damage in found] == [kind]
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=re.escape(found[0].message)):
        index_shards(tmp_path, format="captions")


@pytest.mark.parametrize(
    ("names", "reader", "record"),
    [
        (("0.jpg", "0.png"), read_docdownstream, {"messages": [{"role": "user", "content": "<image>?"}]}),
        (("0.jpg", "00.jpg"), read_bigdocs, {"sample_id": "a", "query": "?", "annotations": "5"}),
        (("jpg", "png"), read_bigdocs, {"sample_id": "a", "query": "?", "annotations": "5"}),
        (("jpg", "png"), CaptionReader(prompt=""), {"caption": "a"}),
    ],
)
def test_two_members_that_are_one_image_are_skipped_by_every_reader(tmp_path, names, reader, record):
    members = [("a.json", json.dumps(record).encode()), *((f"a.{name}", IMAGE) for name in names)]
    write_tar(tmp_path / "0.tar", [("0.jpg", IMAGE), ("0.json", b'{"caption": "x"}'), *members])
    assert index_shards(tmp_path).extra["unreadable"] == {"repeated_member": 1}
    with pytest.raises(SampleError, match=f"{names[0]} and {names[1]} are both image 0: keep one"):
        reader({"__key__": "a", "__url__": "0.tar", **{name.partition(".")[2]: data for name, data in members}})
