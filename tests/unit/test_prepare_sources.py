"""`prepare <kind>` from the command line to shards that verify: each source, its options, real receipts."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare import main
from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample import message_text
from datamodules.shards.verify import Verification

KINDS = ("cc12m", "bigdocs", "docdownstream", "llava", "vcr", "folder")
REAL = Path(os.environ.get("ALIGNVLM_REAL", "../shared/real"))


def png(width: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), (width, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def prepare(*argv: Any) -> list[Any]:
    """Run a kind and return the samples of the dataset, which must have no damage and the name of its folder."""
    assert main([str(word) for word in (*argv, "--workers", "1")]) == 0
    out = Path(argv[2])
    manifest = load_manifest(out)
    assert list(Verification()(out)) == []
    assert manifest.name == out.name
    return [Decoder()(raw) for raw in read_range(manifest, 0, manifest.num_samples)]


def skipped(out: Path) -> dict[str, int]:
    found: dict[str, int] = load_manifest(out).extra["skipped"]
    return found


def answers(samples: list[Any]) -> list[str]:
    return sorted(message_text(sample.messages[-1]) for sample in samples)


def bigdocs_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "sample_id": f"s{number}",
        "image": {"bytes": png(number + 2), "path": None},
        "query": ["Write a caption."],
        "annotations": [f"Table {number}"],
        "query_info": '{"license": "CC-BY-4.0"}',
    } | changes


def named_row(number: int, name: str, **changes: Any) -> dict[str, Any]:
    row = bigdocs_row(number, img_id=name) | changes
    del row["image"]
    return row


def test_cc12m(tmp_path, capsys):
    for shard in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"in/cc12m-train-{shard:04d}.tar", "w") as tar:
            for key in range(3):
                for ending, data in (("jpg", png()), ("txt", f"a {shard}{key}".encode()), ("json", b"{}")):
                    if (shard, key, ending) == (1, 2, "txt"):
                        continue
                    info = tarfile.TarInfo(f"{key:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    samples = prepare("cc12m", tmp_path / "in", tmp_path / "out")
    assert answers(samples) == ["a 00", "a 01", "a 02", "a 10", "a 11"]
    assert {message_text(sample.messages[0]) for sample in samples} == {"Describe the image briefly."}
    assert {(sample.source, sample.task) for sample in samples} == {("cc12m", "caption")}
    assert load_manifest(tmp_path / "out").license == "other (conceptual-12m)"
    assert skipped(tmp_path / "out") == {"empty_caption": 1}
    assert "skipped: 1 (empty_caption)" in capsys.readouterr().out


def test_bigdocs_with_images_in_its_rows(tmp_path):
    rows = [bigdocs_row(number) for number in range(5)] + [bigdocs_row(5, annotations=["a", "b"])]
    write_parquet(tmp_path / "BigDocs/ArxivTableCap/train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "BigDocs/ArxivTableCap/val-00000-of-00001.parquet", [bigdocs_row(9)])
    write_parquet(tmp_path / "BigDocs/cord-v2/train-00000-of-00001.parquet", [bigdocs_row(8)])
    samples = prepare("bigdocs", tmp_path / "BigDocs", tmp_path / "out", "--config", "ArxivTableCap")
    assert answers(samples) == [f"Table {number}" for number in range(5)]
    assert samples[0].meta == {"query_info": '{"license": "CC-BY-4.0"}'}
    assert samples[0].source == "bigdocs/ArxivTableCap"
    assert load_manifest(tmp_path / "out").license == "CC-BY-4.0"
    assert skipped(tmp_path / "out") == {"query_count": 1}
    with pytest.raises(ConfigError, match=r"does not name its config"):
        prepare("bigdocs", tmp_path / "BigDocs", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"cord-v2 holds its images: remove --image-root"):
        prepare("bigdocs", tmp_path / "BigDocs/cord-v2", tmp_path / "x", "--image-root", tmp_path)
    with pytest.raises(ConfigError, match=r"is of config cord-v2, not ArxivOCR"):
        prepare("bigdocs", tmp_path / "BigDocs/cord-v2", tmp_path / "x", "--config", "ArxivOCR")


@pytest.mark.parametrize("config", ["COCOtext", "pubtables-1m", "TextOCR", "Open4Business"])
def test_bigdocs_with_images_in_a_folder(tmp_path, config):
    for number in range(3):
        write_file(tmp_path / f"pictures/train/p{number}.png", png(number + 2))
    rows = [named_row(0, "p0"), named_row(1, "p1.png"), named_row(2, "none"), named_row(3, "../p2.png")]
    path = write_parquet(tmp_path / f"{config}/train-00000-of-00001.parquet", rows)
    samples = prepare("bigdocs", path, tmp_path / "out", "--image-root", tmp_path / "pictures")
    assert {message_text(sample.messages[-1]): sample.sizes for sample in samples} == {
        "Table 0": [(2, 3)],
        "Table 1": [(3, 3)],
    }
    assert samples[0].source == f"bigdocs/{config}"
    assert skipped(tmp_path / "out") == {"missing_image": 1, "unsafe_path": 1}
    with pytest.raises(ConfigError, match=r"only names its images \(img_id\)"):
        prepare("bigdocs", path, tmp_path / "x")
    with pytest.raises(DataError, match=r"there is no folder of images"):
        prepare("bigdocs", path, tmp_path / "x", "--image-root", tmp_path / "none")


def test_bigdocs_names_of_tables_are_paths_of_pages(tmp_path):
    for name, width in (("203-csv/7", 3), ("204-csv/7", 4), ("2-17", 5)):
        write_file(tmp_path / f"pages/{name}.png", png(width))
    names = ["203-csv/7", "204-csv/7", "2-17", "205-csv/7"]  # of the last there is no page, but others of its number
    rows = [named_row(number, name) for number, name in enumerate(names)]
    path = write_parquet(tmp_path / "WikiTQ/train-00000-of-00001.parquet", rows)
    samples = prepare("bigdocs", path, tmp_path / "out", "--image-root", tmp_path / "pages")
    assert {sample.meta["img_id"]: sample.sizes for sample in samples} == {
        "203-csv/7": [(3, 3)], "204-csv/7": [(4, 3)], "2-17": [(5, 3)],
    }  # fmt: skip
    assert skipped(tmp_path / "out") == {"missing_image": 1}


@pytest.mark.parametrize("config", ["WikiTQ", "TabFact"])
def test_splits_that_models_are_compared_on_are_refused(tmp_path, config):
    write_file(tmp_path / "pages/7.png", png(3))
    pages = ("--image-root", tmp_path / "pages")
    for split in ("val", "test"):
        path = write_parquet(tmp_path / f"{config}/{split}-00000-of-00001.parquet", [named_row(0, "7")])
        with pytest.raises(DataError, match=r"no files of split 'train'"):
            prepare("bigdocs", path, tmp_path / "x", *pages)
        with pytest.raises(ConfigError, match=rf"the {split} split of {config} is a benchmark of the paper"):
            prepare("bigdocs", path.parent, tmp_path / "x", *pages, "--split", split)
        path.rename(path.with_name("rows.parquet"))
    odd = write_parquet(tmp_path / f"odd/{config}/test/0000.parquet", [named_row(0, "7")])
    with pytest.raises(ConfigError, match=r"the val split of .* is a benchmark"):
        prepare("bigdocs", odd, tmp_path / "x", *pages, "--split", "validation")
    # The name says no split, but the rows may be asked for as those of another.
    with pytest.raises(ConfigError, match=r"the test split of .* is a benchmark"):
        prepare("bigdocs", path.with_name("rows.parquet"), tmp_path / "x", *pages, "--split", "test")


def test_splits_that_models_are_compared_on_can_be_allowed(tmp_path):
    write_file(tmp_path / "pages/7.png", png(3))
    path = write_parquet(tmp_path / "WikiTQ/test-00000-of-00001.parquet", [named_row(0, "7")])
    words = ("--image-root", tmp_path / "pages", "--split", "test", "--allow-benchmark-splits")
    assert len(prepare("bigdocs", path, tmp_path / "out", *words)) == 1


def document(number: int, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "image": [name],
        "messages": [
            {"role": "user", "content": f"<|image|>Question {number}?"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA" if number % 2 else "ChartQA",
    } | changes


@pytest.fixture
def documents(tmp_path) -> Path:
    rows = [document(number, f"./imgs/{number // 2}.png") for number in range(6)]
    rows += [document(6, "./imgs/none.png"), document(7, "./imgs/0.png", image=[])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(3):
        write_file(tmp_path / f"pages/imgs/{number}.png", png(number + 2))
    return tmp_path


def test_docdownstream_from_a_folder(documents):
    out = documents / "out"
    samples = prepare("docdownstream", documents / "train.jsonl", out, "--image-root", documents / "pages")
    assert answers(samples) == [f"answer {number}" for number in range(6)]
    assert skipped(out) == {"missing_image": 1, "placeholder_count": 1}
    assert load_manifest(out).sources == {"ChartQA": 3, "DocVQA": 3}
    assert load_manifest(out).license == "Apache-2.0"


def test_docdownstream_of_some_datasets(documents):
    words = ("--image-root", documents / "pages", "--sources", "ChartQA")
    samples = prepare("docdownstream", documents / "train.jsonl", documents / "out", *words)
    assert answers(samples) == ["answer 0", "answer 2", "answer 4"]
    assert skipped(documents / "out") == {"missing_image": 1}


def conversation(number: int, mark: str = "<image>\n") -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": f"answer {number}"}]


def test_llava_list(tmp_path):
    rows: list[Any] = [{"id": str(n), "image": f"0/{n}.jpg", "conversations": conversation(n)} for n in range(3)]
    rows += [{"id": "t", "conversations": conversation(3, "")}, {"id": "b", "conversations": conversation(4)}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for number in range(3):
        write_file(tmp_path / f"images/0/{number}.jpg", png(number + 2))
    words = (tmp_path / "list.json", tmp_path / "out", "--image-root", tmp_path / "images")
    samples = prepare("llava", *words)
    assert answers(samples) == [f"answer {number}" for number in range(4)]
    assert sorted(len(sample.images) for sample in samples) == [0, 1, 1, 1]
    assert skipped(tmp_path / "out") == {"placeholder_count": 1}
    with pytest.raises(ConfigError, match=r"--config and --split choose parquet files"):
        prepare("llava", tmp_path / "list.json", tmp_path / "x", "--split", "train")


def test_llava_next(tmp_path):
    rows = [
        {
            "id": str(n),
            "conversations": conversation(n),
            "data_source": "a",
            "image": {"bytes": png(), "path": "x"},
        }
        for n in range(3)
    ]
    rows += [{"id": "t", "conversations": conversation(3, ""), "data_source": "b", "image": None}]
    rows += [{"id": "b", "conversations": conversation(4), "data_source": "b", "image": None}]
    write_parquet(tmp_path / "data/train-00000-of-00250.parquet", rows)
    samples = prepare("llava", tmp_path, tmp_path / "out")
    assert answers(samples) == [f"answer {number}" for number in range(4)]
    assert load_manifest(tmp_path / "out").sources == {"a": 3, "b": 1}
    assert skipped(tmp_path / "out") == {"placeholder_count": 1}


def test_vcr(tmp_path):
    rows = [
        {
            "question_id": number,
            "stacked_image": {"bytes": png(number + 2), "path": None},
            "crossed_text": ["opened in 1974", f"coast {number}"] if number else [],
            "caption": "c",
        }
        for number in range(4)
    ]
    write_parquet(tmp_path / "VCR-wiki-en-easy/data/train-00000-of-00009.parquet", rows)
    samples = prepare("vcr", tmp_path / "VCR-wiki-en-easy", tmp_path / "out")
    assert answers(samples) == [f"opened in 1974\ncoast {number}" for number in (1, 2, 3)]
    assert load_manifest(tmp_path / "out").sources == {"vcr-wiki-en-easy": 3}
    assert skipped(tmp_path / "out") == {"empty_answer": 1}


def test_folder(tmp_path):
    for number in range(4):
        write_file(tmp_path / f"scans/{number}.png", png(number + 2))
        if number:
            (tmp_path / f"scans/{number}.txt").write_text(f"text {number}")
    samples = prepare("folder", tmp_path / "scans", tmp_path / "out", "--prompt", "Read.", "--license", "mine")
    assert answers(samples) == ["text 1", "text 2", "text 3"]
    assert {message_text(sample.messages[0]) for sample in samples} == {"Read."}
    assert (load_manifest(tmp_path / "out").license, samples[0].source) == ("mine", "scans")
    assert skipped(tmp_path / "out") == {"missing_text": 1}


@pytest.mark.skipif(not (REAL / "sroie").is_dir(), reason="no real receipts: set ALIGNVLM_REAL")
def test_real_receipts_with_their_fields_beside_them(tmp_path):
    """Real photographs, each field a question; one is without a text, one has a transcription."""
    root = tmp_path / "receipts"
    root.mkdir()
    names = sorted(path.stem for path in (REAL / "sroie").glob("*.jpg"))[:12]
    fields = {}
    for name in names:
        (root / f"{name}.jpg").symlink_to((REAL / "sroie" / f"{name}.jpg").absolute())
        note = json.loads((REAL / "sroie" / f"{name}.json").read_text("utf-8"))
        fields[name] = note["fields"]
        asked = [{"question": f"What is the {field}?", "answer": value} for field, value in note["fields"].items()]
        if name == names[1]:
            (root / f"{name}.txt").write_text("\n".join(line["text"] for line in note["lines"]), "utf-8")
        elif name != names[0]:
            (root / f"{name}.json").write_text(json.dumps({"qa": asked}), "utf-8")
    samples = prepare("folder", root, tmp_path / "out", "--prompt", "Read all text.")
    assert len(samples) == 11
    assert skipped(tmp_path / "out") == {"missing_text": 1}
    output = sorted(
        [message_text(turn) for turn in sample.messages[1::2]] for sample in samples if len(sample.messages) > 2
    )
    assert output == sorted(list(fields[name].values()) for name in names[2:])
    assert all(min(sample.sizes[0]) > 300 for sample in samples)


def test_several_processes_give_the_same_bytes(tmp_path):
    for number in range(3):
        write_file(tmp_path / f"pictures/p{number}.png", png(number + 2))
    rows = [named_row(number, f"p{number % 4}") for number in range(12)]
    path = write_parquet(tmp_path / "TextOCR/train.parquet", rows)
    words = ("--image-root", str(tmp_path / "pictures"), "--name", "set")
    for workers in ("1", "2"):
        assert main(["bigdocs", str(path), str(tmp_path / workers), *words, "--workers", workers]) == 0
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)
    assert skipped(tmp_path / "2") == {"missing_image": 3}


def test_help_of_each_kind(capsys):
    for kind in KINDS:
        with pytest.raises(SystemExit) as caught:
            main([kind, "--help"])
        assert caught.value.code == 0
        assert f"usage: prepare {kind}" in capsys.readouterr().out
