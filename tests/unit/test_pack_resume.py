"""Packing that is killed: it resumes where it was, gives the same bytes, and never looks finished before it is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.pack import spool
from datamodules.prepare.pack.engine import pack
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.pack.work_folder import WorkFolder
from datamodules.shards.manifest import load_manifest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from datamodules.prepare.pack import spool
from datamodules.prepare.pack.engine import pack
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.jsonl import JsonlData

if __name__ == "__main__":
    spool.TAR_SAMPLES = 40
    raw, out = Path(sys.argv[1]), Path(sys.argv[2])
    data = JsonlData(path=raw / "train.jsonl", image_root=raw, source="set")
    pack(data, PackOptions(out=out, name="set", samples_per_shard=20, workers=int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number in range(40):
        Image.effect_noise((200, 150), 80).save(folder / f"{number}.png")
    with (folder / "train.jsonl").open("w") as stream:
        for number in range(600):
            turns = [
                {"role": "user", "content": f"<|image|>q{number}"},
                {"role": "assistant", "content": "a"},
            ]
            name = "none.png" if number == 77 else f"{number % 40}.png"
            stream.write(json.dumps({"image": name, "messages": turns, "id": f"row {number}"}) + "\n")
    (folder / "program.py").write_text(PROGRAM)
    return folder


@pytest.fixture(autouse=True)
def small_tars(monkeypatch) -> None:
    monkeypatch.setattr(spool, "TAR_SAMPLES", 40)


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    pack(data(raw), options(out))
    return out


def data(raw: Path) -> JsonlData:
    return JsonlData(path=raw / "train.jsonl", image_root=raw, source="set")


def options(out: Path, **changes: object) -> PackOptions:
    return PackOptions(out=out, **{"name": "set", "samples_per_shard": 20, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_when(ready: Callable[[], bool], raw: Path, out: Path, *, workers: int) -> None:
    """Start a packing and kill it, and nothing but it, with no chance to clean up."""
    command = [sys.executable, str(raw / "program.py"), str(raw), str(out), str(workers)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)
    own = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path("/proc", number).exists() for number in own):
        assert time.monotonic() < end, "a process outlives the run that started it"
        time.sleep(0.01)


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def resume_and_watch(raw: Path, out: Path, pattern: str, whole: Path) -> None:
    """Resume a killed run; what was finished must stay as it is."""
    with pytest.raises(DataError, match="not a complete dataset"):
        load_manifest(out)
    finished = times(out, pattern)
    assert finished
    seen: dict[str, int] = {}
    remove = WorkFolder.remove

    def look_first(self: WorkFolder) -> None:
        seen.update(times(out, pattern))
        remove(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "remove", look_first)
        pack(data(raw), options(out))
    assert {name: seen[name] for name in finished} == finished
    assert len(seen) > len(finished)
    assert content(out) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_while_reading(raw, whole, tmp_path, workers):
    out = tmp_path / "set"
    tars = out / ".prepare" / "spool"
    kill_when(lambda: len(list(tars.glob("*.json"))) >= 3, raw, out, workers=workers)
    assert not list(out.glob("*.tar"))
    resume_and_watch(raw, out, ".prepare/spool/*.json", whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_while_writing_shards(raw, whole, tmp_path, workers):
    out = tmp_path / "set"
    packed = out / ".prepare" / "packed"
    kill_when(lambda: len(list(packed.glob("*.json"))) >= 4, raw, out, workers=workers)
    finished = {json.loads(path.read_text())["shard"]["path"] for path in packed.glob("*.json")}
    assert finished and len(finished) < 30
    # A shard whose record was not written yet counts as unfinished.
    for path in out.glob("*.tar"):
        if path.name not in finished:
            path.unlink()
    resume_and_watch(raw, out, "*.tar", whole)


def leave_unfinished(raw: Path, out: Path, **changes: object) -> None:
    """Leave all but the manifest, as a run that was killed at its very end."""

    def stop(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(data(raw), options(out, **changes))


def test_a_run_that_was_killed_while_it_cleaned_up_is_finished(raw, whole, tmp_path):
    leave_unfinished(raw, tmp_path / "set")
    before = times(tmp_path / "set", "*.tar")
    assert pack(data(raw), options(tmp_path / "set")).num_samples == 599
    assert times(tmp_path / "set", "*.tar") == before
    assert content(tmp_path / "set") == content(whole)


@pytest.mark.parametrize("damage", ["cut", "other plan", "no index"])
def test_a_shard_that_is_not_as_its_record_says_is_written_again(raw, whole, tmp_path, damage):
    out = tmp_path / "set"
    leave_unfinished(raw, out)
    (out / "manifest.json").unlink()
    shard, record = out / "set-00003.tar", out / ".prepare" / "packed" / "000003.json"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "no index":
        (out / "set-00003.index.safetensors").unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"plan": "another"}))
    before = times(out, "*.tar")
    pack(data(raw), options(out))
    after = times(out, "*.tar")
    assert [name for name in before if before[name] != after[name]] == ["set-00003.tar"]
    assert content(out) == content(whole)


@pytest.mark.parametrize("change", ["seed", "input"])
def test_the_work_on_another_dataset_is_removed_with_a_warning(raw, tmp_path, caplog, change):
    out = tmp_path / "set"
    leave_unfinished(raw, out, limit=30)
    (out / "manifest.json").unlink()
    if change == "seed":
        pack(data(raw), options(out, limit=30, seed=9))
    else:
        os.utime(raw / "train.jsonl", ns=(1, 1))
        pack(data(raw), options(out, limit=30))
    assert "holds work on another dataset" in caplog.text


def test_two_runs_do_not_write_to_one_folder(raw, tmp_path):
    (tmp_path / "set" / ".prepare").mkdir(parents=True)
    with (
        FileLock(tmp_path / "set" / ".prepare" / "run.lock"),
        pytest.raises(DataError, match=r"another run is packing into .*set"),
    ):
        pack(data(raw), options(tmp_path / "set"))
