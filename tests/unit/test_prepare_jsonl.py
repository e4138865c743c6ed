"""`prepare jsonl`: same bytes twice, every invalid record counted by reason, and errors that name file and line."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.prepare import main
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.pack.engine import pack
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.sources.source import or_error
from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest, verify_shard
from datamodules.shards.reader import read_range
from datamodules.shards.sample import SampleError, message_text


def line(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "image": [f"./imgs/{number}.png"],
        "messages": [
            {"role": "user", "content": f"<|image|>Question {number}?"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA" if number % 2 else "ChartQA",
    } | changes


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "imgs").mkdir()
    for number in range(12):
        Image.new("RGB", (number + 2, 3), (number, 0, 0)).save(tmp_path / "imgs" / f"{number}.png")
    return tmp_path


def write(root: Path, *lines: Any) -> Path:
    path = root / "train.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def prepare(root: Path, out: str, *, start: int = 0, **options: Any) -> Any:
    raw = JsonlData(path=root / "train.jsonl", image_root=root, source="set", start=start)
    return pack(raw, PackOptions(out=root / out, name="set", license="CC0-1.0", **options))


def samples(folder: Path) -> list[Any]:
    manifest = load_manifest(folder)
    return [Decoder()(raw) for raw in read_range(manifest, 0, manifest.num_samples)]


def test_two_runs_give_the_same_bytes_and_another_seed_does_not(root):
    write(root, *map(line, range(12)))
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare(root, out, seed=seed, samples_per_shard=5)
    names = sorted(path.name for path in (root / "a").iterdir())
    shards = [f"set-0000{i}.{end}" for i in range(3) for end in ("index.safetensors", "tar")]
    assert names == ["manifest.json", "report.json", *shards]
    assert all((root / "a" / name).read_bytes() == (root / "b" / name).read_bytes() for name in names)
    assert (root / "a" / "set-00000.tar").read_bytes() != (root / "c" / "set-00000.tar").read_bytes()


def test_records_become_samples_in_a_global_shuffle(root):
    lines = [{"text": "TOTAL", "box": [0, 0, 2, 2]}]
    write(root, *map(line, range(11)), line(11, references=["a", "b"], lines=lines))
    manifest = prepare(root, "out")
    found = samples(root / "out")
    assert manifest.sources == {"ChartQA": 6, "DocVQA": 6}
    asked = [message_text(sample.messages[0]) for sample in found]
    assert sorted(asked) == sorted(f"Question {number}?" for number in range(12))
    assert asked != [f"Question {number}?" for number in range(12)]
    last = next(sample for sample in found if message_text(sample.messages[0]) == "Question 11?")
    assert (last.references, last.lines, last.sizes) == (["a", "b"], lines, [(13, 3)])
    assert (last.source, last.task) == ("DocVQA", "qa_sft")


@pytest.mark.parametrize(
    "box",
    [
        *([0, 0, side, 2] for side in (float("nan"), float("inf"), 10**400, True, "2", None)),
        *([-1e300, 0, 2, 2], [2, 0, 1, 2], [0, 2, 2, 1], [0, 0, 2], "0022", {"x0": 0}),
    ],
)
def test_a_line_without_a_box_of_four_ordered_numbers_is_skipped(root, box):
    write(root, *map(line, range(2)), line(2, lines=[{"text": "TOTAL", "box": box}]))
    manifest = prepare(root, "out")
    assert (manifest.num_samples, manifest.extra["skipped"]) == (2, {"lines": 1})


def test_several_turns_and_images_are_kept(root):
    turns = [
        {"role": "user", "content": "<|image|><|image|>Same?"},
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Width"},
    ]
    write(root, line(0, image=["imgs/3.png", "imgs/1.png"], messages=turns))
    prepare(root, "out")
    (sample,) = samples(root / "out")
    assert [message_text(turn) for turn in sample.messages] == ["Same?", "No", "Why?", "Width"]
    assert sample.sizes == [(5, 3), (3, 3)]


BAD = {
    "bad_json": '{"image": [',
    "missing_image": line(1, image=["imgs/none.png"]),
    "undecodable_image": line(1, image=["imgs/broken.png"]),
    "placeholder_count": line(1, image=["imgs/1.png", "imgs/2.png"]),
    "invalid_sample": line(1, messages=[{"role": "user", "content": 7}]),
    "unsafe_path": line(1, image=["imgs/../../secret.png"]),
    "empty_answer": line(
        1,
        messages=[
            {"role": "user", "content": "<|image|>?"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": " \n"},
        ],
        references=[" "],
    ),
}


def test_questions_alone_and_answers_that_are_references_are_kept(root):
    asked = [{"role": "user", "content": "<|image|>?"}]
    empty = [*asked, {"role": "assistant", "content": ""}]
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "b"}]
    write(
        root,
        line(0, messages=asked),
        line(1, messages=asked, references=["a"]),
        line(2, messages=empty, references=["a"]),
        line(3, messages=[*empty, *more]),
    )
    assert prepare(root, "out").num_samples == 4


def test_invalid_records_are_counted_by_reason_in_manifest_and_report(root):
    (root / "imgs" / "broken.png").write_bytes((root / "imgs" / "1.png").read_bytes()[:50])
    write(root, line(0), *BAD.values(), "", line(2))
    manifest = prepare(root, "out")
    assert manifest.num_samples == 2
    assert manifest.extra["skipped"] == dict.fromkeys(sorted(BAD), 1)
    report = json.loads((root / "out" / "report.json").read_text())
    assert (report["read"], report["written"], report["skipped"]) == (9, 2, manifest.extra["skipped"])
    for number, (reason, problem) in enumerate(zip(BAD, report["problems"], strict=True), start=2):
        assert problem["reason"] == reason
        assert f"train.jsonl, line {number}:" in problem["message"]
        assert manifest.extra["skipped_first"][reason] == [problem["message"]]


@pytest.mark.parametrize("reason", BAD)
def test_strict_names_file_and_line_and_leaves_nothing(root, reason):
    (root / "imgs" / "broken.png").write_bytes((root / "imgs" / "1.png").read_bytes()[:50])
    write(root, line(0), BAD[reason])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2"):
        prepare(root, "out", strict=True)
    assert list((root / "out").iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_know_is_counted(root, number):
    write(root, line(0), line(1, meta={"score": [number]}))
    assert prepare(root, "out").extra["skipped"] == {"bad_json": 1}


def test_both_counts_are_named(root):
    write(root, BAD["placeholder_count"])
    with pytest.raises(DataError, match="1 image placeholders in the messages but 2 images"):
        prepare(root, "out", strict=True)


def test_a_file_without_any_usable_record_is_an_error(root):
    write(root, BAD["missing_image"])
    with pytest.raises(DataError, match=r"none of 1 records is usable \(missing_image: 1\).*imgs/none\.png"):
        prepare(root, "out")
    assert not (root / "out" / "manifest.json").exists()
    (root / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no such file: .*train\.jsonl"):
        prepare(root, "out")


def test_start_and_limit_split_a_file_without_overlap(root):
    write(root, *map(line, range(12)))
    prepare(root, "train", limit=9)
    prepare(root, "test", start=9)
    prepare(root, "middle", start=3, limit=2)
    assert {message_text(s.messages[0]) for s in samples(root / "middle")} == {"Question 3?", "Question 4?"}
    asked = {out: {message_text(s.messages[0]) for s in samples(root / out)} for out in ("train", "test")}
    assert asked["test"] == {f"Question {number}?" for number in (9, 10, 11)}
    assert len(asked["train"]) == 9
    assert not asked["train"] & asked["test"]
    with pytest.raises(ConfigError, match="--start: expected 0 or more, found -1"):
        prepare(root, "x", start=-1)


def test_command_line_writes_and_reports(root, capsys):
    write(root, line(0), BAD["missing_image"], line(1))
    assert main(["jsonl", str(root / "train.jsonl"), str(root / "receipts"), "--samples-per-shard", "1"]) == 0
    assert load_manifest(root / "receipts").name == "receipts"
    out = capsys.readouterr().out
    assert "2 samples in 2 shards" in out
    assert "skipped: 1 (missing_image)" in out
    assert load_manifest(root / "receipts").sources == {"ChartQA": 1, "DocVQA": 1}


def test_rows_are_the_records_each_with_its_line(root):
    path = write(root, line(0), "", *map(line, range(1, 7)), "", "")
    raw = JsonlData(path=path, image_root=root, source="set")
    found = [raw.sample(row).record["messages"][0]["content"][1]["text"] for row in raw.rows(path)]
    assert found == [f"Question {number}?" for number in range(7)]
    assert raw.num_rows() == 7
    path.write_text(path.read_text().replace("imgs/5.png", "imgs/none.png"))
    bad = [error for row in raw.rows(path) if isinstance(error := or_error(raw.sample, row), SampleError)]
    assert [str(error).split(":")[0] for error in bad] == [f"{path}, line 7"]


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "..\\x.png"])
def test_a_path_out_of_the_image_folder_is_refused(root, name):
    write(root, line(0), line(1, image=[name]))
    (root.parent / "x.png").write_bytes((root / "imgs" / "1.png").read_bytes())
    assert prepare(root, "out").extra["skipped"] == {"unsafe_path": 1}


def test_foreign_shards_are_indexed(root, capsys):
    folder = root / "cc12m"
    folder.mkdir()
    (root / "text").write_text("a caption")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(3 + shard):
                tar.add(root / "imgs" / "1.png", f"{shard:05d}{number:04d}.png")
                tar.add(root / "text", f"{shard:05d}{number:04d}.txt")
    assert main(["index", str(folder), "--license", "other"]) == 0
    assert "7 samples in 2 shards" in capsys.readouterr().out
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        verify_shard(manifest.shard_path(shard), shard, verify_sha256=True)
    assert [shard.num_samples for shard in manifest.shards] == [3, 4]
    assert len(list(read_range(manifest, 0, 7))) == 7


def test_an_unknown_kind_is_answered_with_the_nearest(capsys):
    with pytest.raises(ConfigError, match=r"unknown kind 'jsnol'; did you mean 'jsonl'"):
        main(["jsnol"])
    assert main(["--help"]) == 0
    assert "synthetic" in capsys.readouterr().out


IN_PARTS = [
    {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "Question 1?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer 1"}]},
]
OTHER_FORMS = {
    "images": {"image": None, "images": ["imgs/1.png"]},
    "a path alone": {"image": "imgs/1.png"},
    "another mark": {
        "messages": [
            {"role": "user", "content": "<image>Question 1?"},
            {"role": "assistant", "content": "answer 1"},
        ]
    },
    "parts": {"messages": IN_PARTS},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_of_a_conversation_are_the_same_sample(root, form):
    write(root, line(1))
    prepare(root, "plain")
    write(root, line(1, **OTHER_FORMS[form]))
    prepare(root, "other")
    one, other = (samples(root / out)[0] for out in ("plain", "other"))
    assert (one.messages, one.sizes) == (other.messages, other.sizes)
    assert one.sizes == [(3, 3)]


def test_a_mark_that_does_not_stand_for_images_stays_text(root):
    turns = [
        {"role": "user", "content": "What is <image> in HTML?"},
        {"role": "assistant", "content": "no tag"},
    ]
    record = line(0, messages=turns)
    del record["image"]  # null would say that its image is lost
    write(root, record)
    prepare(root, "out")
    (sample,) = samples(root / "out")
    assert message_text(sample.messages[0]) == "What is <image> in HTML?"
    assert sample.images == []


@pytest.mark.parametrize(
    ("command", "record", "message"),
    [
        ("jsonl", {"image": "a.png", "question": "?", "answer": "!"},
         r"train\.jsonl: no column messages or conversations; .*found: answer, image, question\)\. Expected: messages "
         r"or conversations, image or images\. No other kind"),
        ("docdownstream", {"id": 1, "image": "a.png"}, r"no column messages or conversations; .*found: id, image"),
        ("llava", [{"query": "?", "image": "a.png"}],
         r"train\.json: no column conversations or messages; .*\(found: image, query\)"),
        ("llava", [{"sample_id": 1, "query": "", "annotations": "", "image": ""}], r"`prepare bigdocs` reads"),
    ],
)  # fmt: skip
def test_records_of_another_schema_are_refused_with_what_reads_them(root, command, record, message):
    path = root / ("train.json" if isinstance(record, list) else "train.jsonl")
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message):
        main([command, str(path), str(root / "out"), "--workers", "1"])
    assert not (root / "out").exists()


def test_one_record_of_another_schema_is_an_invalid_record(root):
    write(root, {"question": "?"}, line(1))
    assert prepare(root, "out").extra["skipped"] == {"invalid_sample": 1}


def test_lines_of_llava_are_no_list(root):
    write(root, line(0))
    with pytest.raises(ConfigError, match=r"train\.jsonl: LLaVA's records are read from one JSON list"):
        main(["llava", str(root / "train.jsonl"), str(root / "out")])
