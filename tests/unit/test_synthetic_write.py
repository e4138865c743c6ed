"""Datasets of synthetic documents on disk: the same bytes for any number of processes, and never another dataset."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from alignvlm_pl.errors import ConfigError
from datamodules.prepare.synthetic import write_split
from datamodules.prepare.synthetic.command import main
from datamodules.shards.manifest import load_manifest


def _records(folder: Path) -> list[dict]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return found


def test_the_number_of_processes_does_not_change_the_bytes(tmp_path: Path) -> None:
    shards = []
    for processes in (1, 2):
        manifest = write_split(
            tmp_path / str(processes), split="train", num_documents=40, name="documents", processes=processes
        )
        shards.append([shard.sha256 for shard in manifest.shards])
    assert shards[0] == shards[1]


def test_evaluation_datasets_have_one_question_and_its_answer(tmp_path: Path) -> None:
    write_split(
        tmp_path / "forms",
        split="heldout",
        num_documents=3,
        kinds=["form"],
        questions_per_document=2,
        one_question_per_sample=True,
        transcription_share=0.0,
        processes=1,
    )
    records = _records(tmp_path / "forms")
    assert len(records) == 6 and {record["task"] for record in records} == {"synthetic-form"}
    for record in records:
        assert len(record["messages"]) == 2
        assert record["references"] == [record["messages"][1]["content"][0]["text"]]


def test_a_dataset_that_is_there_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    arguments = {"split": "train", "num_documents": 2, "processes": 1}
    folder = tmp_path / "set"
    write_split(folder, **arguments)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert write_split(folder, **arguments).num_samples == 2
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="num_documents is 2 there but 3 was given"):
        write_split(folder, **{**arguments, "num_documents": 3})


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not empty and holds no synthetic dataset \(thesis.tex"):
        write_split(tmp_path, split="train", num_documents=1, processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a-00000.tar.partial").write_bytes(b"half")
    write_split(tmp_path / "a", split="train", num_documents=1, processes=1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "a-00000.index.safetensors",
        "a-00000.tar",
        "manifest.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["forms"]}, "unknown 'forms'; did you mean 'form'"),
        ({"kinds": {"form": 0.0}}, "at least one needs a weight above 0"),
        ({"num_documents": 0}, "must be 1 or more, found 0"),
        ({"split": "test"}, "unknown 'test'"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_split(tmp_path / "x", **{"split": "train", "num_documents": 1, "processes": 1, **arguments})


def test_the_command_writes_all_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", str(tmp_path), "--train", "2", "--lines", "1", "--heldout", "2", "--processes", "1"]
    assert main([*argv, "--kinds", "form=1,table"]) == 0
    sets = {folder.name: load_manifest(folder) for folder in tmp_path.iterdir()}
    assert sorted(sets) == [
        "documents",
        "heldout-charts",
        "heldout-forms",
        "heldout-lines",
        "heldout-receipts",
        "heldout-tables",
        "lines",
    ]
    assert sets["heldout-lines"].extra["arguments"]["fonts"] == "heldout"
    assert sets["documents"].extra["arguments"]["kinds"] == {"form": 1.0, "table": 1.0}
    assert "heldout-tables: 2 samples" in capsys.readouterr().out


def test_the_generator_does_not_import_torch() -> None:
    render = "import sys, datamodules.prepare.synthetic as s; s.generate_document(0, split='train')"
    code = f"{render}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
