"""Parquet sources: rows of the published schemas, each kind of invalid row, other schemas, where files lie."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare.bigdocs import BigDocs
from datamodules.prepare.llava import LLaVARows
from datamodules.prepare.sources.images import ImageFolder
from datamodules.prepare.vcr import PROMPT, VCRRows
from datamodules.shards.sample import SampleError
from tests.unit.parquet_files import bigdocs_row, files, image, png, write
from tests.unit.reading import read, texts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def bigdocs(path: Path, **options: Any) -> BigDocs:
    return BigDocs(files=files(path), fetched=path.parent, source="bigdocs/ArxivTableCap", **options)


def test_bigdocs_rows_with_images(tmp_path):
    rows = [
        bigdocs_row(0),
        bigdocs_row(1, query=["What?", "Where?"], annotations=["Heads", "In the split"]),
        bigdocs_row(2, image=image(bytes=png(9, "JPEG"))),
        bigdocs_row(3, image=image(bytes=png(9, "GIF"))),
    ]
    samples, bad = read(bigdocs(write(tmp_path / "train-00000-of-00001.parquet", rows, row_group_size=2)))
    assert not bad
    assert [ending for sample in samples for _, ending in sample.images] == ["png", "png", "jpg", "png"]
    assert samples[0].images == [(png(4), "png")]  # the original bytes
    assert samples[0].record == {
        "id": "bigdocs/ArxivTableCap/2107.04510v2.page_7.tab_2",
        "source": "bigdocs/ArxivTableCap",
        "task": "document",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "index": 0},
                    {"type": "text", "text": "Write a caption for the table in the image."},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Table 0: Ablation."}]},
        ],
        "meta": {name: rows[0][name] for name in ("query_info", "annotation_info", "image_info")},
    }
    assert texts(samples[1]) == ["What?", "Heads", "Where?", "In the split"]


def test_bigdocs_second_names_of_columns(tmp_path):
    row = {
        "identifier": "a",
        "images": [image(4), image(5)],
        "queries": ["Same?"],
        "annotation": ["No"],
        "task": "compare",
    }
    (sample,), bad = read(bigdocs(write(tmp_path / "a.parquet", [row])))
    assert not bad
    assert sample.images == [(png(4), "png"), (png(5), "png")]
    assert (sample.record["id"], sample.record["task"]) == ("bigdocs/ArxivTableCap/a", "compare")


def test_bigdocs_texts_instead_of_lists(tmp_path):
    (sample,), _ = read(bigdocs(write(tmp_path / "a.parquet", [bigdocs_row(query="What?", annotations="This")])))
    assert texts(sample) == ["What?", "This"]


def test_bigdocs_invalid_rows_are_counted_by_reason(tmp_path):
    rows = [
        bigdocs_row(0),
        bigdocs_row(1, annotations=["a", "b"]),
        bigdocs_row(2, query=["a", "b"]),
        bigdocs_row(3, query=None),
        bigdocs_row(4, query=[None]),
        bigdocs_row(5, annotations=[" "]),
        bigdocs_row(6, image=None),
        bigdocs_row(7, image={"bytes": None, "path": "a.png"}),
        bigdocs_row(8, image=image(bytes=png()[:40])),
    ]
    samples, bad = read(bigdocs(write(tmp_path / "a.parquet", rows)))
    assert len(samples) == 1
    assert bad == {
        "query_count": 3, "bad_row": 1, "empty_answer": 1, "missing_image": 2, "undecodable_image": 1,
    }  # fmt: skip


def named_row(name: Any, **changes: Any) -> dict[str, Any]:
    return {"sample_id": f"s{name}", "img_id": name, "query": ["Read."], "annotations": ["EXIT"]} | changes


def test_bigdocs_images_of_a_folder(tmp_path, caplog):
    root = tmp_path / "images"
    for place, width in (("train/0a5c.jpg", 4), ("train/b.v2.png", 5), ("other/0a5c.jpg", 6)):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(png(width))
    names = ["0a5c", "0a5c.jpg", "train/0a5c.jpg", "b.v2", "none", "../images/train/b.v2.png", "/etc/passwd"]
    path = write(tmp_path / "train.parquet", [named_row(name) for name in names])
    raw = bigdocs(path, images=ImageFolder(root=root))
    samples, bad = read(raw)
    held = [content for sample in samples for content, _ in sample.images]
    assert held == [png(6), png(6), png(4), png(5)]  # "other" comes before "train"
    assert bad == {"missing_image": 1, "unsafe_path": 2}
    assert "1 images have the name of an earlier one" in caplog.text


def test_bigdocs_named_images_need_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"only names its images \(img_id\).*--image-root"):
        bigdocs(write(tmp_path / "a.parquet", [named_row("a")])).num_rows()


def test_an_unknown_schema_names_found_and_expected_columns_and_the_kind_that_reads_them(tmp_path):
    vcr = write(tmp_path / "v.parquet", [vcr_row()])
    llava = write(tmp_path / "l.parquet", [llava_row()])
    other = write(tmp_path / "o.parquet", [{"a": 1, "b": 2}])
    with pytest.raises(
        DataError,
        match=r"v\.parquet: no column sample_id or identifier; this is no known BigDocs schema \(found: caption, "
        r"crossed_text, .*\)\. "
        r"Expected: sample_id or identifier, query or queries, annotations or annotation, "
        r"image or images or img_id\. "
        r"These are columns that `prepare vcr` reads",
    ):
        bigdocs(vcr).num_rows()
    with pytest.raises(DataError, match=r"`prepare llava` reads"):
        bigdocs(llava).num_rows()
    with pytest.raises(DataError, match=r"\(found: a, b\)\. .*No other kind of `prepare` reads such columns"):
        bigdocs(other).num_rows()
    with pytest.raises(DataError, match=r"no known VCR-wiki schema.*`prepare bigdocs` reads"):
        VCRRows(fetched=tmp_path, files=files(write(tmp_path / "b.parquet", [bigdocs_row()]))).num_rows()


# LLaVA-NeXT


def llava_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{number:06d}",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A bench."},
        ],
        "data_source": "sharegpt4v",
        "image": image(number + 4),
    } | changes


TEXT_ONLY = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]


def test_llava_rows(tmp_path):
    at_end = [{"from": "human", "value": "Tell.\n<image>"}, {"from": "gpt", "value": "<image> is a bench."}]
    rows = [
        llava_row(0),
        llava_row(1, conversations=[{"from": "system", "value": "Be short."}, *at_end]),
        llava_row(2, conversations=TEXT_ONLY, image=None),
        llava_row(3, conversations=TEXT_ONLY, image={"bytes": None, "path": None}, data_source=None),
    ]
    samples, bad = read(LLaVARows(fetched=tmp_path, files=files(write(tmp_path / "data/train-0.parquet", rows))))
    assert not bad
    assert [len(sample.images) for sample in samples] == [1, 1, 0, 0]
    assert [part["type"] for part in samples[0].record["messages"][0]["content"]] == ["image", "text"]
    assert texts(samples[0]) == ["What is it?", "A bench."]
    assert [turn["role"] for turn in samples[1].record["messages"]] == ["system", "user", "assistant"]
    assert samples[1].record["messages"][1]["content"] == [
        {"type": "text", "text": "Tell."}, {"type": "image", "index": 0},
    ]  # fmt: skip
    assert texts(samples[1])[2] == "<image> is a bench."
    assert [sample.record["source"] for sample in samples] == ["sharegpt4v"] * 3 + ["llava-next"]
    assert samples[3].record["id"] == "llava-next/000003"


def test_llava_file_of_text_alone_lacks_the_column_of_images(tmp_path):
    rows = [{"id": "1", "conversations": TEXT_ONLY}]
    (sample,), bad = read(LLaVARows(fetched=tmp_path, files=files(write(tmp_path / "a.parquet", rows))))
    assert (sample.images, bad) == ([], {})


def test_llava_invalid_rows_are_counted_by_reason(tmp_path):
    twice = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "x"}]
    rows = [
        llava_row(0),
        llava_row(1, image=None),
        llava_row(2, conversations=TEXT_ONLY),
        llava_row(3, conversations=twice),
        llava_row(4, conversations=[{"from": "user", "value": "<image>"}]),
        llava_row(5, conversations=[{"from": "human", "value": None}]),
        llava_row(6, conversations=[]),
        llava_row(7, conversations=[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": " "}]),
        llava_row(8, image=image(bytes=b"no picture")),
        llava_row(9, image=image(bytes=None, path="a.png")),
    ]
    samples, bad = read(LLaVARows(fetched=tmp_path, files=files(write(tmp_path / "a.parquet", rows))))
    assert len(samples) == 1
    assert bad == {
        "placeholder_count": 3,
        "bad_conversation": 3,
        "empty_answer": 1,
        "undecodable_image": 1,
        "missing_image": 1,
    }


# VCR


def vcr_row(number: int = 731, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": number,
        "image": image(4),
        "stacked_image": image(5),
        "only_it_image": image(6),
        "caption": "The museum opened in 1974, and holds maps of the northern coast.",
        "crossed_text": ["opened in 1974, and holds", "the northern coast"],
    } | changes


def test_vcr_rows(tmp_path):
    (sample,), _ = read(VCRRows(fetched=tmp_path, files=files(write(tmp_path / "data/train-0.parquet", [vcr_row()]))))
    assert texts(sample) == [PROMPT, "opened in 1974, and holds\nthe northern coast"]
    assert sample.images == [(png(5), "png")]
    assert sample.record["meta"] == {"question_id": 731, "caption": vcr_row()["caption"]}
    assert sample.record["id"] == "vcr-wiki/731"


def test_vcr_invalid_rows_are_counted_by_reason(tmp_path):
    rows = [
        vcr_row(1),
        vcr_row(2, crossed_text=[]),
        vcr_row(3, crossed_text=None),
        vcr_row(4, stacked_image=None),
        vcr_row(5, stacked_image=image(bytes=png()[:50])),
    ]
    samples, bad = read(VCRRows(fetched=tmp_path, files=files(write(tmp_path / "a.parquet", rows))))
    assert len(samples) == 1
    assert bad == {"empty_answer": 1, "bad_row": 1, "missing_image": 1, "undecodable_image": 1}


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [bigdocs_row(n) for n in range(20)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a complete parquet file of \d+ bytes"):
        bigdocs(path).num_rows()
    broken = bytearray(whole)
    broken[4:1200] = bytes(1196)
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r"a\.parquet does not read after row \d+"):
        list(bigdocs(path).rows(files(path)[0]))


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """One row group of 60 MB of images; what pyarrow and Python hold while it is read stays far below it."""
    noise = [os.urandom(1 << 20) for _ in range(60)]
    rows = [bigdocs_row(n, image={"bytes": data, "path": None}) for n, data in enumerate(noise)]
    path = write(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False, write_batch_size=4)
    raw = bigdocs(path)
    del rows, noise
    base, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for row in raw.rows(raw.files[0]):
            with pytest.raises(SampleError):
                raw.sample(row)
            peak = max(peak, pa.total_allocated_bytes() - base)
        peak += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 36 << 20
