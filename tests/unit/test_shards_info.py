"""`shards info`: counts and quantiles by source, with and without a model."""

import io
import json
import re
import tarfile

import pytest
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.cli.shards import load_model
from alignvlm_pl.preprocessing.tiling import Tiling
from datamodules.shards.info import Model, collect
from datamodules.shards.writer import ShardWriter


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", name="set", source="forms", license="CC0-1.0", samples_per_shard=2) as out:
        for number in range(1, 6):
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "x" * 10 * number}]
            record = {"messages": [{"role": "user", "content": content}], "references": ["yes"]}
            out.add({**record, "source": "forms" if number < 4 else "charts"}, [png(100 * number, 50)], ["png"])
    return tmp_path / "set"


def test_quantities_by_source(folder):
    found = collect(folder)[0]
    assert {source: len(info["turns"]) for source, info in found.items()} == {"forms": 3, "charts": 2}
    assert found["forms"] == {
        "turns": [1, 1, 1],
        "images": [1, 1, 1],
        "prompt characters": [10, 20, 30],
        "answer characters": [3, 3, 3],
        "width px": [100, 200, 300],
        "height px": [50, 50, 50],
    }


def test_a_model_counts_tokens(folder):
    tiling = Tiling(tile_height=50, tile_width=100, max_tiles=9, thumbnail="none")
    model = Model(count_tokens=lambda text: len(text) // 5, tiling=tiling, tokens_per_tile=7)
    found = collect(folder, model)[0]
    assert found["forms"]["prompt tokens"] == [2, 4, 6]
    assert found["forms"]["visual tokens"] == [7, 14, 21]


def test_the_command_prints_a_table_a_source(folder, capsys):
    assert main(["shards", "info", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "5 samples, 3 shards" in output
    assert "  charts: 2 samples" in output
    row = next(line for line in output.splitlines() if "prompt characters" in line and "50" in line)
    assert row.split()[2:7] == ["40", "41", "45", "49", "50"]


def test_what_cannot_be_read_is_named(folder, tmp_path, capsys):
    assert main(["shards", "info", str(folder), "--model", str(tmp_path / "no.yaml")]) == 1
    assert "there is no such file" in capsys.readouterr().err


def spoil(folder, *changes):
    """Change the first few bytes that are found in the first shard."""
    path = folder / "set-00000.tar"
    data = bytearray(path.read_bytes())
    for old, new in changes:
        at = data.index(old)
        data[at : at + len(new)] = new
    path.write_bytes(data)


def test_invalid_samples_are_counted_and_the_others_shown(folder, capsys):
    spoil(folder, (b'"messages"', b'"M'), (b'"messages"', b"}}"))
    assert main(["shards", "info", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "  charts: 2 samples" in output
    assert "  forms: 1 samples" in output
    assert "skipped: 1 (invalid_sample), the first: " in output
    assert re.search(r"sample 'set-00000000' in .* is not in the sample schema \(KeyError\('messages'\)\)", output)
    assert "skipped: 1 (bad_json), the first: " in output
    assert collect(folder)[0]["forms"]["turns"] == [1]


def test_datasets_of_another_format(tmp_path, capsys):
    from datamodules.prepare import main as prepare

    (tmp_path / "cc").mkdir()
    with tarfile.open(tmp_path / "cc/00000.tar", "w") as tar:
        for key in range(3):
            note = json.dumps({"caption": "two people", "key": str(key)}).encode()
            members = {"jpg": png(40 + key, 30) if key else b"", "txt": b"two people", "json": note}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key:09d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert prepare(["index", str(tmp_path / "cc"), "--source", "cc12m", "--license", "other"]) == 0
    capsys.readouterr()
    assert main(["shards", "info", str(tmp_path / "cc")]) == 1
    output = " ".join(capsys.readouterr().err.split())
    assert "none of 3 samples reads as --format normal, the first: " in output
    assert "known formats: normal, docdownstream, bigdocs, captions" in output
    assert main(["shards", "info", str(tmp_path / "cc"), "--format", "captions"]) == 0
    output = capsys.readouterr().out
    assert "2 samples" in output
    assert "skipped: 1 (" in output
    (info,) = collect(tmp_path / "cc", form="captions")[0].values()
    assert (info["width px"], info["answer characters"]) == ([41, 42], [10, 10])


@pytest.mark.slow
def test_a_config_counts_as_its_processor_does(tmp_path):
    import dataclasses

    import yaml

    from alignvlm_pl.models.build import build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    spec = tiny_spec(tmp_path / "tokenizer")
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"spec": json.loads(json.dumps(dataclasses.asdict(spec)))}))
    model, processor = load_model(path), build_processor(spec)
    assert model.count_tokens("two words") == len(processor.tokenizer("two words", add_special_tokens=False).input_ids)
    assert (model.tiling, model.tokens_per_tile) == (processor.geometry, processor.tokens_per_tile)


@pytest.mark.slow
def test_preview_shows_prompt_and_supervised_tokens(tmp_path, capsys):
    import dataclasses
    import re

    import yaml

    from alignvlm_pl.models.tiny import tiny_spec

    path = tmp_path / "model.yaml"
    path.write_text(
        yaml.safe_dump({"spec": json.loads(json.dumps(dataclasses.asdict(tiny_spec(tmp_path / "tokenizer"))))})
    )
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0") as out:
        for answer in ("12", "<b>34"):
            asked = [{"type": "image", "index": 0}, {"type": "text", "text": "how <i>many?"}]
            answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            out.add({"messages": [{"role": "user", "content": asked}, answered]}, [png(56, 56)], ["png"])
    words = [
        "shards",
        "preview",
        str(tmp_path / "set"),
        "--model",
        str(path),
        "--out",
        str(tmp_path / "p.html"),
    ]
    assert main([*words, "--start", "1"]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "<b>34" not in page
    assert "<i>many" not in page
    assert page.count("<section>") == page.count("data:image/png;base64,") == 1
    (supervised,) = re.findall(r'<pre>.*<span class="supervised">(.*?)</span>', page, re.DOTALL)
    assert "34" in supervised
    assert re.search(r'<span class="image">\[\d+ visual tokens\]</span>', page)
    assert main([*words, "--count", "0"]) == 1
    assert "expected start >= 0" in capsys.readouterr().err
    # One bad sample is listed, and the other shown; nothing but bad ones is an error.
    spoil(tmp_path / "set", (b'"messages"', b'"M'))
    capsys.readouterr()
    assert main(words) == 0
    output, page = capsys.readouterr().out, (tmp_path / "p.html").read_text()
    assert "1 samples" in output
    assert re.search(r"skipped \(invalid_sample\): .*set-00000000", output)
    assert page.count("<section>") == 1
    assert re.search(r"<li>invalid_sample: .*set-00000000", page)
    assert main([*words, "--count", "1"]) == 1
    assert "none of 1 samples reads as --format normal" in " ".join(capsys.readouterr().err.split())
