"""Where the files of a parquet source lie: configs and splits, other stores, a hub that is not there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.storage.stored_files import choose_files, find_file, list_files, list_folder
from tests.unit.parquet_files import bigdocs_row, write


@pytest.fixture
def release(tmp_path) -> Path:
    for place in (
        "ArxivTableCap/train-00000-of-00002.parquet",
        "ArxivTableCap/train-00001-of-00002.parquet",
        "ArxivTableCap/val-00000-of-00001.parquet",
        "WikiTQ/test-00000-of-00001.parquet",
        "WikiTQ/train-00000-of-00001.parquet",
    ):
        write(tmp_path / "set" / place, [bigdocs_row()])
    (tmp_path / "set/README.md").write_text("about")
    return tmp_path / "set"


def chosen(place: Any, config: str | None, split: str | None) -> list[str]:
    found = choose_files(list_files(str(place), ".parquet"), config=config, split=split, where=str(place))
    return ["/".join(Path(file.path).parts[-2:]) for file in found]


def test_files_are_chosen_by_config_and_split(release):
    first = "ArxivTableCap/train-00000-of-00002.parquet"
    assert chosen(release, "ArxivTableCap", "train") == [first, first.replace("00000-of", "00001-of")]
    assert chosen(release, "ArxivTableCap", "validation") == ["ArxivTableCap/val-00000-of-00001.parquet"]
    assert len(chosen(release, "ArxivTableCap", None)) == 3
    assert chosen(release / "WikiTQ", None, "test") == ["WikiTQ/test-00000-of-00001.parquet"]
    assert chosen(release / "*" / "*-00001-of-*.parquet", None, "train") == [
        "ArxivTableCap/train-00001-of-00002.parquet"
    ]
    assert chosen(release / first, None, "train") == [first]
    with pytest.raises(ConfigError, match=r"several configs, name one with --config: ArxivTableCap, WikiTQ"):
        chosen(release, None, "train")
    with pytest.raises(DataError, match=r"no files of config 'TabFact'; found: ArxivTableCap, WikiTQ"):
        chosen(release, "TabFact", "train")
    with pytest.raises(DataError, match=r"no files of split 'val'.*found: test, train"):
        chosen(release / "WikiTQ", None, "val")
    with pytest.raises(DataError, match=r"no \.parquet file there .*other files"):
        chosen(release / "README.md", None, None)
    for place in (release / "none", release / "*.none"):
        with pytest.raises(DataError, match=r"none: there is no such file or folder"):
            chosen(place, None, None)


def test_one_file_by_its_path_or_address(release):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/one/a.jsonl", b"{}")
    try:
        assert (find_file("memory://one/a.jsonl").size, find_file(str(release / "README.md")).size) == (2, 5)
        with pytest.raises(DataError, match=r"memory://one is no file"):
            find_file("memory://one")
        with pytest.raises(DataError, match=r"b\.jsonl: there is no such file or folder"):
            find_file("memory://one/b.jsonl")
        with pytest.raises(DataError, match=r"there is no .*none"):
            find_file(str(release / "none"))
    finally:
        memory.rm("/one", recursive=True)


def test_only_what_lies_right_in_a_folder(release):
    assert [file.name for file in list_folder(str(release))] == ["README.md"]
    assert [file.name for file in list_folder(str(release / "README.md"))] == ["README.md"]
    with pytest.raises(DataError, match=r"none: there is no such file or folder"):
        list_folder(str(release / "none"))


def test_the_folders_above_a_dataset_say_nothing_of_its_split(tmp_path):
    write(tmp_path / "test" / "set" / "a.parquet", [bigdocs_row()])
    assert chosen(tmp_path / "test" / "set", None, "train") == ["set/a.parquet"]


def test_another_store_lists_the_same(release):
    """What a hub's files go through as well: fsspec lists them, nothing lies on this disk."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in release.rglob("*.parquet"):
        memory.pipe(f"/hub/{path.relative_to(release).as_posix()}", path.read_bytes())
    try:
        found = choose_files(list_files("memory://hub", ".parquet"), config="ArxivTableCap", split="train", where="m")
        assert [file.path for file in found] == [
            f"memory:///hub/ArxivTableCap/train-0000{number}-of-00002.parquet" for number in (0, 1)
        ]
    finally:
        memory.rm("/hub", recursive=True)


def test_a_hub_without_network_fails_at_once_and_says_what_to_do(tmp_path):
    """In a process of its own, whose hub is a port that nothing listens on."""
    code = (
        "from datamodules.storage.stored_files import list_files\n"
        "try:\n    list_files('ServiceNow/BigDocs-7.5M', '.parquet')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout.startswith("DataError ServiceNow/BigDocs-7.5M: there is no such file or folder"), done
    assert "hf://datasets/ServiceNow/BigDocs-7.5M (ConnectError: " in done.stdout
    assert "hf download --repo-type dataset ServiceNow/BigDocs-7.5M --local-dir FOLDER" in done.stdout
