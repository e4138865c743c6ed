"""Lists as LLaVA, LLaMA-Factory and ms-swift write them; placeholders; byte order marks and UTF-16.

Sources: LLaMA-Factory#7046, #10158, #3700, #7280 (lists); 2U1/Qwen2-VL-Finetune#128 and FSDrive#17 (placeholders);
huggingface/datasets#8241 and pydantic-ai PR#8312 (encodings).
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.errors import AlignVLMError
from alignvlm_pl.scoring.files import read_predictions
from alignvlm_pl.utils.text_files import HEAD_BYTES, compression, decode_text
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample_formats import read_docdownstream
from tests.unit.reading import command

cc12m, docdownstream, folder, jsonl, llava = map(command, ("cc12m", "docdownstream", "folder", "jsonl", "llava"))
benchmark, index_main, sroie = map(command, ("benchmark", "index", "sroie"))


def png(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 3, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    (tmp_path / "im").mkdir()
    for name in "ab":
        (tmp_path / "im" / f"{name}.png").write_bytes(png(ord(name)))
    return tmp_path


def run(converter, path, out, *more):
    assert converter([str(path), str(out), "--workers", "1", *map(str, more)]) == 0
    report = json.loads((out / "report.json").read_text())
    return report["written"], report["skipped"]


def contents(out):
    manifest = load_manifest(out)
    found = [json.loads(raw["json"]) for raw in read_range(manifest, 0, manifest.num_samples)]
    return [[part.get("text", part["type"]) for turn in one["messages"] for part in turn["content"]] for one in found]


def messages(*asked):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, asked, strict=False)]


def conversations(*asked):
    return [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 9, asked, strict=False)]


FORMS = {
    "images": {"images": ["im/a.png"], "conversations": conversations("<image>\nwhat?", "a")},
    "a path in an object": {"images": [{"path": "im/a.png", "bytes": None}], "messages": messages("<image>what?", "a")},
    "messages": {"images": "im/a.png", "messages": messages("<image>what?", "a")},
    "the other placeholder": {"image": "im/a.png", "conversations": conversations("<|image|>\nwhat?", "a")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["list.json", "list.jsonl", "lines.jsonl"])
def test_every_converter_of_lists_reads_every_form(images, form, name):
    lines = name == "lines.jsonl"
    (images / name).write_text(json.dumps(FORMS[form]) if lines else json.dumps([FORMS[form]] * 2))
    for converter in [jsonl] if lines else [jsonl, llava]:
        out = images / converter.__module__.rpartition(".")[2]
        assert run(converter, images / name, out) == (1 if lines else 2, {})
        assert contents(out)[0] == ["image", "what?", "a"]
    if lines:
        with pytest.raises(AlignVLMError, match="`prepare jsonl` reads lines of them"):
            llava([str(images / name), str(images / "out")])


def test_a_list_is_limited_and_started_as_lines_are(images):
    records = [{"images": ["im/a.png"], "messages": messages(f"<image>{number}", "a")} for number in range(9)]
    (images / "list.json").write_text(json.dumps([*records, 7]))
    assert run(jsonl, images / "list.json", images / "out", "--start", 4, "--limit", 2) == (2, {})
    assert sorted(found[1] for found in contents(images / "out")) == ["4", "5"]
    assert run(jsonl, images / "list.json", images / "all") == (9, {"bad_json": 1})


def test_absolute_paths_below_the_folder_of_images(images, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "c.png"
    outside.write_bytes(png())
    (images / "link").symlink_to(images / "im")
    paths = [images / "im" / "a.png", f"file://{images}/im/b.png", outside, images / "im" / ".." / ".." / "c.png"]
    records = [{"images": [str(path)], "messages": messages("<image>?", "a")} for path in paths]
    (images / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, root in {"out": "im", "two": "link"}.items():
        found = run(jsonl, images / "lines.jsonl", images / name, "--image-root", images / root)
        assert found == (2, {"unsafe_path": 2})
    problem = json.loads((images / "out" / "report.json").read_text())["problems"][0]["message"]
    assert "is absolute; expected one below" in problem and "--image-root" in problem
    (images / "list.json").write_text(json.dumps([FORMS["images"] | {"images": [str(paths[0])]}]))
    assert run(llava, images / "list.json", images / "llava", "--image-root", images / "im") == (1, {})


PLACEHOLDERS = {  # images, question, what is found
    "none of one": (0, "{0}x", "1 image placeholders in the messages but 0 images (1 times {0})"),
    "two of one": (1, "{0}{0}x", "2 image placeholders in the messages but 1 images (2 times {0})"),
    "one of two": (2, "{0}x", "1 image placeholders in the messages but 2 images (1 times {0})"),
    "none": (1, "x", "0 image placeholders in the messages but 1 images (none)"),
    "one of one": (1, "{0}x", ["image", "x"]),
    "text about it": (1, "<|image|>what is {0}?", ["image", "what is <image>?"]),
}
_SPELLED = ("text about it", "<|image|>")  # here the other spelling is the text


@pytest.mark.parametrize(
    ("case", "mark"),
    [(case, mark) for case in PLACEHOLDERS for mark in ("<image>", "<|image|>") if (case, mark) != _SPELLED],
)
def test_both_spellings_are_counted_by_one_rule(images, case, mark):
    number, question, expected = PLACEHOLDERS[case]
    question, paths = question.format(mark), ["im/a.png", "im/b.png"][:number]
    # In an answer the mark is plain text.
    asked = question, f"the mark {mark}"
    (images / "lines.jsonl").write_text(json.dumps({"image": paths, "messages": messages(*asked)}))
    (images / "list.json").write_text(json.dumps([{"image": paths, "conversations": conversations(*asked)}]))
    (images / "train.jsonl").write_text(json.dumps({"image": paths, "messages": messages(*asked)}))
    runs = {"jsonl": (jsonl, "lines.jsonl"), "llava": (llava, "list.json"), "doc": (docdownstream, "train.jsonl")}
    for name, (converter, file) in runs.items():
        if isinstance(expected, str):
            with pytest.raises(AlignVLMError) as raised:
                run(converter, images / file, images / name)
            assert "placeholder_count: 1" in str(raised.value) and expected.format(mark) in str(raised.value)
        else:
            run(converter, images / file, images / name)
            assert contents(images / name) == [[*expected, asked[1]]]


def test_a_word_of_a_text_is_no_placeholder_unless_the_file_uses_it(images):
    word = {"messages": messages("What is <image> in HTML?", "a tag")}
    (images / "lines.jsonl").write_text(json.dumps(word))
    assert run(jsonl, images / "lines.jsonl", images / "out") == (1, {})
    assert contents(images / "out") == [["What is <image> in HTML?", "a tag"]]
    lines = [word, {"image": "im/a.png", "messages": messages("<image>?", "a")}]
    (images / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (images / "list.json").write_text(json.dumps(lines))
    for name in ("lines.jsonl", "list.json"):
        assert run(jsonl, images / name, images / name.partition(".")[0]) == (1, {"placeholder_count": 1})


LOST = {"messages": messages("<image>lost", "a")}
GOOD = {"image": "im/a.png", "references": ["a"], "messages": messages("<image>?", "a")}


@pytest.mark.parametrize("field", [{"image": None}, {"images": None}, {"image": []}, {"images": []}])
@pytest.mark.parametrize("converter", [jsonl, docdownstream])
def test_the_placeholder_of_a_null_image_is_no_text(images, converter, field):
    (images / "train.jsonl").write_text("\n".join(map(json.dumps, [LOST | field, messages_only("hi")])))
    assert run(converter, images / "train.jsonl", images / "out") == (1, {"placeholder_count": 1})


def messages_only(text):
    return {"messages": messages(text, "a")}


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json"])
@pytest.mark.parametrize("after", [0, 1])
def test_the_whole_file_says_what_the_word_stands_for(images, name, after):
    words = [messages_only(f"hi {number}") for number in range(5000 if name == "list.json" else 260)]
    records = [GOOD, *words, LOST, messages_only("hi")] if after else [*words, LOST, GOOD]
    text = json.dumps(records) if name == "list.json" else "\n".join(map(json.dumps, records))
    (images / name).write_text(text.replace("<image>?", r"\u003cimage\u003e?"))
    assert run(jsonl, images / name, images / "out", "--start", len(words) + after) == (1, {"placeholder_count": 1})


def test_llava_and_benchmark_leave_out_what_jsonl_leaves_out(images):
    (images / "list.json").write_text(json.dumps([LOST, GOOD, LOST | {"image": None}]))
    assert run(llava, images / "list.json", images / "llava") == (1, {"placeholder_count": 2})
    (images / "wtq_test.jsonl").write_text("\n".join(map(json.dumps, [LOST, GOOD, LOST | {"images": None}])))
    assert benchmark(["wtq", str(images / "wtq_test.jsonl"), str(images / "wtq")]) == 0
    assert load_manifest(images / "wtq").extra["skipped"] == {"placeholder_count": 2}


LONG = "data:image/png;base64," + "iVBO" * 1000
NAMES_OF_NO_FILE = [LONG, "x" * 5000 + ".png", "iVBO" * 1000, "https://a.b/c.png", "s3://a/b.png", "hf://" + "c" * 5000]


def converted(images, field, *more_turns):
    """Run every converter of lists on a good record and one with the field; return their reports and messages."""
    records = [{"image": "im/a.png", "messages": messages("<image>?", "a"), "references": ["a"]}]
    records.append({"messages": messages("<image>b", "a"), "references": ["a"]} | field)
    (images / "list.json").write_text(json.dumps(records))
    (images / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    calls = [
        (jsonl, "lines.jsonl"),
        (jsonl, "list.json"),
        (docdownstream, "lines.jsonl"),
        (llava, "list.json"),
    ]
    for number, (converter, name) in enumerate(calls):
        out = images / f"out{number}"
        counts = run(converter, images / name, out, "--overwrite")
        yield counts, [problem["message"] for problem in json.loads((out / "report.json").read_text())["problems"]]
    assert benchmark(["wtq", str(images / "lines.jsonl"), str(images / "bench"), "--overwrite"]) == 0
    extra = load_manifest(images / "bench").extra
    skipped = [text for texts in extra["skipped_first"].values() for text in texts]
    yield (2 - len(skipped), extra["skipped"]), skipped


@pytest.mark.parametrize("name", NAMES_OF_NO_FILE)
def test_messages_about_names_of_images_are_short(images, name):
    for counts, problems in converted(images, {"image": [{"url": name} if ":" in name else name]}):
        assert counts == (1, {"missing_image": 1})
        assert len(problems[0]) < 400 and ("://" not in name or name[:10] in problems[0])


def test_no_message_holds_a_whole_record(images):
    for field in (
        {"messages": "x" * 9000},
        {"messages": messages("<image>" * 5000, "a")},
        {"image": {"a": "x" * 9000}},
    ):
        for (written, _), problems in converted(images, field):
            assert written == 1 and len(problems[0]) < 900


PATHS = ["im/b.png", {"path": "im/b.png"}, {"url": "im/b.png"}, "{root}/im/b.png", "file://{root}/im/b.png"]
PARTS = [{"type": "image", name: "im/b.png"} for name in ("image", "path", "url")]
PARTS.append({"type": "image_url", "image_url": {"url": "im/b.png"}})


OTHER_MEDIA = [{name: value} for name in ("video", "videos", "audio", "audios") for value in ("v.mp4", ["v.mp4"])]


@pytest.mark.parametrize("field", [*OTHER_MEDIA, {"videos": [], "audio": None}])
def test_videos_and_audio_are_not_trained_as_text(images, field):
    asked = "<video>\n<audio>?", "a"
    for counts, problems in converted(images, {"messages": messages(*asked)} | field):
        assert counts == (1, {"unread_media": 1}) and "video and audio are not read" in problems[0]
    (images / "list.json").write_text(json.dumps([{"conversations": conversations(*asked)} | field, GOOD]))
    for name, converter in {"one": jsonl, "two": llava}.items():
        assert run(converter, images / "list.json", images / name) == (1, {"unread_media": 1})
    for text in ({"messages": messages("what is <video>?", "a")}, {"messages": messages("?", "<video>"), "videos": []}):
        assert {counts[0] for counts, _ in converted(images, text)} == {2}


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_the_system_of_a_record_is_its_first_turn(images, form):
    turns = messages("<image>?", "a") if form == "messages" else conversations("<image>?", "a")
    first = {"role": "system", "content": "S"} if form == "messages" else {"from": "system", "value": "S"}
    record = {"image": "im/a.png", "system": "S", form: turns}
    different = record | {form: [first, *turns], "system": "other"}
    records = [record, record | {form: [first, *turns]}, different, record | {"system": 3}, record | {"system": None}]
    (images / "list.json").write_text(json.dumps(records))
    (images / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    for converter, file in (
        (jsonl, "lines.jsonl"),
        (docdownstream, "lines.jsonl"),
        (jsonl, "list.json"),
        (llava, "list.json"),
    ):
        out = images / f"{converter.__module__}{file}".replace(".", "-")
        assert run(converter, images / file, out) == (3, {"bad_row": 2})
        assert sorted(contents(out)) == [["S", "image", "?", "a"]] * 2 + [["image", "?", "a"]]


def test_image_and_images_must_agree_and_an_empty_path_is_no_image(images):
    two = {"image": "im/a.png", "images": ["im/a.png"]}
    verdicts = {"bad_row": {"image": "im/a.png", "images": ["im/b.png"]}}
    for question in ("<image>b", "b"):
        for reason, field in [*verdicts.items(), *(("missing_image", {"image": one}) for one in ("", [""], [" "]))]:
            for counts, _ in converted(images, field | {"messages": messages(question, "a")}):
                assert counts == (1, {reason: 1})
    assert [counts for counts, _ in converted(images, two)] == [(2, {})] * 5


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_images_in_every_form(images, path):
    path = path.format(root=images) if isinstance(path, str) else path
    for counts, _ in converted(images, {"image": [path]}):
        assert counts == (2, {})


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_turn_name_their_images(images, part):
    text = {"type": "text", "text": "b?"}
    asked = {"messages": [{"role": "user", "content": [part, text]}, *messages("", "a")[1:]]}
    for field in (asked, asked | {"images": ["im/b.png"]}):
        assert [counts for counts, _ in converted(images, field)] == [(2, {})] * 5
    assert ["image", "b?", "a"] in contents(images / "out0")
    nameless = {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, *messages("", "a")[1:]]}
    for counts, problems in converted(images, nameless):
        assert counts == (1, {"placeholder_count": 1})
        assert "1 image parts in the messages but 0 images; name their files in 'images'" in problems[0]


def test_parts_in_tars_and_beside_images_are_those_images(images):
    part = {"type": "image", "image": "elsewhere/b.png"}
    record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, *messages("", "a")[1:]]}
    raw = {"__key__": "a", "__url__": "tar", "json": json.dumps(record).encode(), "png": png()}
    assert read_docdownstream(raw)[0]["messages"][0]["content"][0] == {"type": "image", "index": 0}
    (images / "im" / "a.json").write_text(json.dumps(record))
    assert run(folder, images / "im", images / "out") == (1, {"missing_text": 1})


def test_a_benchmark_reads_no_image_outside_its_folder(images):
    (images / "d1").mkdir()
    table = "index\timage_path\tquestion\tanswer\n0\t{}\t?\ta\n1\td1/a.png\t?\ta\n"
    (images / "d1" / "a.png").write_bytes(png())
    for name in ("../im/a.png", str(images / "im" / "a.png"), "d1/../../im/a.png"):
        records = [
            {"image": [one], "messages": messages("<image>?", "a"), "references": ["a"]} for one in (name, "a.png")
        ]
        (images / "d1" / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
        (images / "d1" / "t.tsv").write_text(table.format(name).replace("d1/a", "a"))
        for task, file in (("wtq", "lines.jsonl"), ("docvqa", "t.tsv")):
            assert benchmark([task, str(images / "d1" / file), str(images / "out"), "--overwrite"]) == 0
            assert load_manifest(images / "out").extra["skipped"] == {"unsafe_path": 1}


@pytest.mark.parametrize("converter", [docdownstream, benchmark])
def test_a_list_in_place_of_lines_is_named(images, converter):
    (images / "lines.jsonl").write_text(json.dumps([GOOD, GOOD]))
    with pytest.raises(AlignVLMError, match="is one JSON list, expected an object on each line"):
        converter([*["wtq"] * (converter is benchmark), str(images / "lines.jsonl"), str(images / "out")])


PACKED = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_compressed_lists_and_predictions_are_named(images, kind, ending):
    for name, read in {
        "a.jsonl": lambda path: jsonl([str(path), str(images / "out")]),
        "a.json": lambda path: llava([str(path), str(images / "out")]),
        "b.jsonl": lambda path: docdownstream([str(path), str(images / "out")]),
        "c.jsonl": lambda path: benchmark(["wtq", str(path), str(images / "out")]),
        "c.tsv": lambda path: benchmark(["docvqa", str(path), str(images / "out")]),
        **{
            f"d.{each}": lambda path: read_predictions(path, get_benchmark("docvqa"))
            for each in ("jsonl", "json", "tsv")
        },
        "d.xlsx": lambda path: read_predictions(path, get_benchmark("docvqa")),
    }.items():
        path = images / f"{name}{ending}"
        path.write_bytes(PACKED[kind](b'{"a": 1}\n'))
        with pytest.raises(AlignVLMError, match=rf"{path.name} is (gzip|{kind}).*unpack it first"):
            read(path)


@pytest.mark.parametrize("kind", PACKED)
def test_compressed_texts_beside_images_are_named(images, kind):
    for ending in ("json", "txt"):
        (images / "im" / f"a.{ending}").write_bytes(PACKED[kind](b"{}"))
        with pytest.raises(AlignVLMError, match=rf"it is {kind}; unpack it first"):
            folder([str(images / "im"), str(images / "out")])
    with pytest.raises(AlignVLMError, match=rf"it is {kind}; unpack it first"):
        sroie([str(images / "im"), str(images / "out")])


def test_a_zip_of_images_is_no_compressed_list(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(AlignVLMError, match="name the list with --file"):
        llava([str(tmp_path), str(tmp_path / "out")])
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(AlignVLMError, match=r"train.jsonl.gz is gzip; unpack it first"):
        docdownstream([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize("kind", ["zip", "7z", "rar"])
@pytest.mark.parametrize("converter", [cc12m, llava, folder, index_main, sroie])
def test_archives_in_place_of_their_files_are_named(tmp_path, kind, converter):
    (tmp_path / f"a.{kind}").write_bytes(b"PK\x03\x04")
    out = [] if converter is index_main else [str(tmp_path / "out")]
    with pytest.raises(AlignVLMError, match=f"a.{kind} is {kind}; unpack it first"):
        converter([str(tmp_path), *out])


def test_placeholders_of_records_in_tars_and_beside_images(images):
    record = {"image": ["a.jpg"], "messages": messages("<image>what?", "a")}
    raw = {"__key__": "a", "__url__": "tar", "json": json.dumps(record).encode()}
    turn, _ = read_docdownstream(raw | {"jpg": b"x"})[0]["messages"]
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    with pytest.raises(AlignVLMError, match="1 image placeholders in the messages but 0 images"):
        read_docdownstream(raw)
    for name, question in {"a": "<image>what?", "b": "<image><image>what?"}.items():
        (images / "im" / f"{name}.json").write_text(json.dumps({"messages": messages(question, "a")}))
    assert run(folder, images / "im", images / "out") == (1, {"placeholder_count": 1})
    assert contents(images / "out") == [["image", "what?", "a"]]


MARKS = {"utf-8-sig": codecs.BOM_UTF8, "utf-16": b"", "utf-16-le": b"", "utf-16-be": codecs.BOM_UTF16_BE}


@pytest.mark.parametrize("encoding", MARKS)
def test_encodings_of_lists_and_tables_are_read_or_named(images, encoding):
    record = {"id": "é", "image": "im/a.png"}
    turns = {"messages": messages("<image>é?", "a"), "conversations": conversations("<image>é?", "a")}
    texts = {
        jsonl: ("lines.jsonl", json.dumps(record | {"messages": turns["messages"]}, ensure_ascii=False)),
        llava: ("list.json", json.dumps([record | {"conversations": turns["conversations"]}], ensure_ascii=False)),
        docdownstream: ("train.jsonl", json.dumps(record | {"messages": turns["messages"]}, ensure_ascii=False)),
    }
    for converter, (name, text) in texts.items():
        mark = MARKS[encoding] if encoding != "utf-8-sig" else b""
        (images / name).write_bytes(mark + text.encode(encoding))
        out = images / name.partition(".")[0]
        if encoding == "utf-8-sig":
            assert run(converter, images / name, out) == (1, {})
            assert contents(out) == [["image", "é?", "a"]]
        else:
            with pytest.raises(AlignVLMError, match=rf"{name} is UTF-16, expected UTF-8; .*iconv -f UTF-16 -t UTF-8"):
                run(converter, images / name, out)


def test_joined_files_have_marks_within(images):
    line = codecs.BOM_UTF8 + json.dumps({"image": "im/a.png", "messages": messages("<image>?", "a")}).encode()
    (images / "lines.jsonl").write_bytes(b"\n".join([line] * 3))
    assert run(jsonl, images / "lines.jsonl", images / "out") == (3, {})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_small_texts_are_read(images, encoding):
    (images / "im" / "a.txt").write_bytes("née".encode(encoding))
    (images / "im" / "b.json").write_bytes(json.dumps({"question": "?", "answer": "née"}).encode(encoding))
    assert run(folder, images / "im", images / "out") == (2, {})
    assert {found[-1] for found in contents(images / "out")} == {"née"}
    with tarfile.open(images / "in.tar", "w") as tar:
        for name, data in {"a.jpg": png(), "a.txt": "née".encode(encoding)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run(cc12m, images / "in.tar", images / "tar")
    assert [found[-1] for found in contents(images / "tar")] == ["née"]
    record = {"key": "1", "prediction": "née", "references": ["née"]}
    (images / "p.JSONL").write_bytes((json.dumps(record) + "\n").encode(encoding))
    (images / "p.json").write_bytes(json.dumps([{"index": 1, "prediction": "née", "answer": "née"}]).encode(encoding))
    for name in ("p.JSONL", "p.json"):
        found = read_predictions(images / name, get_benchmark("docvqa"))
        assert [sample.prediction for sample in found.samples] == ["née"]


def test_a_text_that_begins_like_a_compressed_file_is_text():
    for text in ("BZh", "BZhang lives here", "PK and Rar! are names"):
        assert decode_text(text.encode()) == text
    for level in (1, 9):
        for content in (b"", b"text" * 100):
            assert compression(bz2.compress(content, level)[:HEAD_BYTES]) == "bzip2"
