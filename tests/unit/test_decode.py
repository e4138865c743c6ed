"""Tar members -> Sample: the formats of the sources, what is refused, and how skipping is counted."""

import io
import json
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.shards.decode import Decoder, SkipCounter
from datamodules.shards.sample import UNLABELLED, SampleError, message_text
from datamodules.shards.sample_formats import CaptionReader, read_bigdocs, read_docdownstream


def picture(kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 30)).save(buffer, kind)
    return buffer.getvalue()


def raw(record: Any = None, **members: bytes) -> dict[str, Any]:
    """A grouped tar sample; underscores in names stand for dots."""
    files = {name.strip("_").replace("_", "."): data for name, data in members.items()}
    text = {} if record is None else {"json": json.dumps(record).encode()}
    return {"__key__": "set-00000003", "__url__": "x/set-00000.tar", **text, **files}


def normal(**changes: Any) -> dict[str, Any]:
    question = [{"type": "image", "index": 0}, {"type": "text", "text": "Total?"}]
    answer = [{"type": "text", "text": "12.50"}]
    return {
        "source": "receipts",
        "task": "vqa",
        "images": [{"file": "0.png", "w": 6, "h": 4}],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    } | changes


def test_normal_form_becomes_a_sample():
    lines = [{"text": "TOTAL 12.50", "box": [0, 1, 5, 3]}]
    sample = Decoder()(raw(normal(references=["12.50", "12.5"], lines=lines), _0_png=picture()))
    assert (sample.key, sample.source, sample.task) == ("set-00000003", "receipts", "vqa")
    assert (sample.references, sample.lines, sample.sizes) == (["12.50", "12.5"], lines, [(6, 4)])
    assert sample.images[0].getpixel((0, 0)) == (200, 10, 30)


def test_the_last_answer_is_the_default_reference():
    assert Decoder()(raw(normal(), _0_png=picture())).references == ["12.50"]
    question_only = normal(messages=normal()["messages"][:1])
    assert Decoder()(raw(question_only, _0_png=picture())).references == []


@pytest.mark.parametrize(
    ("sample", "reason", "message"),
    [
        (raw(normal(), _0_png=b"PNG?"), "undecodable_image", r"'set-00000003' in x/set-00000\.tar, 0\.png"),
        (raw(normal(), _0_png=picture()[:45]), "undecodable_image", r"0\.png"),
        (
            raw(normal(images=[{"file": "0.png"}, {"file": "1.png"}]), _0_png=picture(), _1_png=picture()),
            "placeholder_count",
            "'set-00000003' in .*: 1 image placeholders in the messages but 2 images",
        ),
        (raw(normal(messages=[]), _0_png=picture()), "invalid_sample", "at least one turn"),
        (raw(normal(images=[7]), _0_png=picture()), "invalid_sample", "'images' must be a list"),
        (raw(["a list"]), "bad_json", "its json is a list, expected an object"),
        (raw(json=b"{half"), "bad_json", "does not parse"),
    ],
)
def test_a_bad_sample_is_named_and_has_a_reason(sample, reason, message):
    with pytest.raises(SampleError, match=message) as caught:
        Decoder()(sample)
    assert caught.value.reason == reason


def test_the_same_index_twice_is_refused():
    doubled = normal(images=[{"file": "0.png"}, {"file": "1.png"}])
    doubled["messages"][0]["content"].append({"type": "image", "index": 0})
    with pytest.raises(SampleError, match=r"indices \[0, 0\], expected each of 0\.\.1 once"):
        Decoder()(raw(doubled, _0_png=picture(), _1_png=picture()))


@pytest.mark.parametrize("sample", [raw(normal()), raw(_0_png=picture())])
def test_a_partial_sample_is_damage_and_is_never_skipped(sample):
    with pytest.raises(DataError, match=r"is partial|has no json member") as caught:
        Decoder()(sample)
    assert not isinstance(caught.value, SampleError)


def test_caption_members_get_the_prompt():
    sample = Decoder(adapter=CaptionReader(prompt="Describe."))(raw(jpg=picture("JPEG"), txt=b" a red wall \n"))
    assert [message_text(turn) for turn in sample.messages] == ["Describe.", "a red wall"]
    assert sample.messages[0]["content"][0] == {"type": "image", "index": 0}
    assert (sample.source, sample.task) == ("cc12m", "caption")


def test_caption_comes_from_json_and_the_prompt_may_be_empty():
    sample = Decoder(adapter=CaptionReader(prompt=""))(raw({"caption": "a wall"}, jpg=picture("JPEG")))
    assert sample.messages[0]["content"] == [{"type": "image", "index": 0}]
    assert sample.references == ["a wall"]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [(raw(txt=b"a"), "missing_image"), (raw(jpg=picture("JPEG"), txt=b" "), "empty_caption")],
)
def test_incomplete_pairs_are_skippable(sample, reason):
    with pytest.raises(SampleError) as caught:
        CaptionReader(prompt="")(sample)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "record",
    [
        {"sample_id": "2107.04512v2", "query": ["Caption?", "Rows?"], "annotations": ["A table.", "3"]},
        {"identifier": "a", "queries": ["Caption?", "Rows?"], "annotations": ["A table.", "3"]},
    ],
)
def test_bigdocs_columns_become_turns(record):
    sample = Decoder(adapter=read_bigdocs)(raw(record, _0_png=picture()))
    assert [message_text(turn) for turn in sample.messages] == ["Caption?", "A table.", "Rows?", "3"]
    assert sample.references == ["3"]


def test_bigdocs_images_are_in_the_order_of_their_number():
    record = {"sample_id": "a", "query": "q", "annotations": "a"}
    members = {f"_{number}_png": picture(size=(number + 1, 1)) for number in (10, 2, 0)}
    sample = Decoder(adapter=read_bigdocs)(raw(record, **members))
    assert sample.sizes == [(1, 1), (3, 1), (11, 1)]


def test_an_unknown_bigdocs_schema_is_loud():
    with pytest.raises(DataError, match=r"no column sample_id or identifier.*did you mean 'sampleid'") as caught:
        read_bigdocs(raw({"sampleid": "a", "query": "q", "annotations": "a"}))
    assert not isinstance(caught.value, SampleError)
    with pytest.raises(SampleError, match="2 queries but 1 annotations"):
        read_bigdocs(raw({"sample_id": "a", "query": ["q", "r"], "annotations": ["a"]}, _0_png=picture()))


def test_docdownstream_records_and_normal_form_are_both_read():
    record = {
        "messages": [
            {"role": "user", "content": "<|image|>Between <|image|>these?"},
            {"role": "assistant", "content": "Nothing"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA",
    }
    sample = Decoder(adapter=read_docdownstream)(raw(record, _0_png=picture(), _1_png=picture()))
    kinds = [part.get("index", part.get("text")) for part in sample.messages[0]["content"]]
    assert kinds == [0, "Between ", 1, "these?"]
    assert (sample.source, sample.task) == ("DocVQA", "qa_sft")
    assert Decoder(adapter=read_docdownstream)(raw(normal(), _0_png=picture())).source == "receipts"


def bad(number: int, reason: str = "bad_json") -> SampleError:
    return SampleError(f"number {number} is bad", reason)


def test_bad_samples_are_counted_by_source_and_reason():
    counter = SkipCounter(max_share=0.25)
    for number in range(20):
        counter.skip(bad(number, "bad_json" if number % 2 else "undecodable_image"), source="ab"[number % 4 // 2])
    assert counter.new_counts() == {source: {"undecodable_image": 5, "bad_json": 5} for source in "ab"}
    assert counter.new_counts() == {}


def test_too_many_bad_samples_stop_the_run():
    counter = SkipCounter(max_share=0.1, seen=210)
    for number in range(21):
        counter.skip(bad(number), source="a")
    with pytest.raises(
        DataError,
        match=r"22 of 210 samples were invalid \(bad_json of a: 22\).*share of 0\.1 \(max_skipped_share\).*number 22",
    ):
        counter.skip(bad(22), source="a")


def test_samples_without_anything_to_learn_have_a_share_of_their_own():
    counter = SkipCounter(max_share=0.0, max_unlabelled=0.1, seen=200)
    for number in range(20):
        counter.skip(bad(number, UNLABELLED), source="a")
    with pytest.raises(DataError, match=r"21 of 200 samples were without anything to learn .*max_unlabelled_share"):
        counter.skip(bad(20, UNLABELLED), source="a")
    with pytest.raises(DataError, match="1 of 200 samples were invalid"):
        SkipCounter(max_share=0.0, max_unlabelled=0.1, seen=200).skip(bad(0), source="a")


def test_few_samples_are_judged_mildly():
    counter = SkipCounter(max_share=0.01, seen=2)
    counter.skip(bad(0), source="a")
    counter.skip(bad(1), source="a")
    with pytest.raises(DataError, match="3 of 2 samples"):
        counter.skip(bad(2), source="a")


def test_a_run_in_which_every_sample_is_bad_stops_whatever_is_allowed():
    counter = SkipCounter(max_share=1.0, max_unlabelled=1.0)
    for number in range(199):
        counter.seen += 1
        counter.skip(bad(number, UNLABELLED if number % 2 else "bad_json"), source="a")
    counter.seen += 1
    with pytest.raises(DataError, match=r"none of the first 200 samples.*nothing_to_learn of a.*number 199"):
        counter.skip(bad(199), source="a")
    counter = SkipCounter(max_share=1.0, seen=201)
    for number in range(200):
        counter.skip(bad(number), source="a")
