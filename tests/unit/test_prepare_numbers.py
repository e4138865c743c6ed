"""Numbers of `prepare` and `shards` commands that are too small, and commands that have nothing to do, are errors."""

import io
import tarfile

import pytest

from alignvlm_pl.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sroie", "in", "out", "--heldout", "-1"], "--heldout: expected 0 or more, found -1"),
        (["sroie", "in", "in", "out", "--width", "-1"], "--width: expected 0 or more, found -1"),
        (["sroie", "in", "out", "--max-lines", "0"], "--max-lines: expected 1 or more, found 0"),
        (["jsonl", "in.jsonl", "out", "--start", "-1"], "--start: expected 0 or more, found -1"),
        (["jsonl", "in.jsonl", "out", "--limit", "0"], "--limit: expected 1 or more, found 0"),
        (["jsonl", "in.jsonl", "out", "--workers", "0"], "--workers: expected 1 or more, found 0"),
        (["index", "in", "--workers", "0"], "--workers: expected 1 or more, found 0"),
        (["synthetic", "--out", "out", "--train", "-1"], "--train: expected 0 or more, found -1"),
        (["synthetic", "--out", "out", "--train=0", "--lines=0", "--heldout=0"], "nothing to render"),
    ],
)
def test_a_number_that_is_too_small_is_named(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "in").mkdir()
    assert main(["prepare", *command]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def tar(path, **members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", ["auto", "captions", "docdownstream", "bigdocs", "normal"])
def test_an_index_of_invalid_samples_alone_is_an_error(tmp_path, capsys, form):
    tar(tmp_path / "0.tar", a_json=b"[", b_json=b"{")
    assert main(["prepare", "index", str(tmp_path), "--format", form]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"none of 2 samples is valid as --format {form} (bad_json: 2); the first: sample 'a' in" in error
    assert not (tmp_path / "manifest.json").exists()
