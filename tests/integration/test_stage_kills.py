"""Three stages in one command, killed with -9 wherever it hurts: the same command ends as an unbroken run does."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.drills.launch import FRESH, start_command

STAGES = ("one", "two", "three")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def write_recipe(world: Any, root: Path, devices: int) -> Path:
    """Connector alone, everything, everything but the vision tower; with dropout, which needs the random numbers."""
    model = yaml.safe_load((world.root / "model.yaml").read_text())
    model["spec"]["llm"]["config"]["attention_dropout"] = 0.25
    base = {"lr_connector": 1e-3, "global_batch_size": 4, "max_steps": 3}
    stages = {"one": {}, "two": {"lr_vision": 1e-3, "lr_llm": 1e-3}, "three": {"lr_llm": 1e-3}}
    cpu = yaml.safe_load((world.root / "cpu.yaml").read_text())
    cpu["callbacks"] = [{"class_path": f"tests.drills.{name}"} for name in ("recorder.Recorder", "killer.Killer")]
    cpu |= {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    files: dict[str, Any] = {"model": model, "cpu": cpu, "benchmark": {"at_stage_end": False}}
    parents = dict(zip(STAGES[1:], STAGES, strict=False))
    for name, values in stages.items():
        parent = {"parent": parents[name]} if name in parents else {}
        files[name] = {"name": name, **base, **values, **parent}
    for name, content in files.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    recipe = {
        "model": "model.yaml",
        "trainer": "cpu.yaml",
        "benchmark": "benchmark.yaml",
        "data": str(world.root / "data.yaml"),
        "checkpoint_every_n_steps": 1,
        "stages": [{"stage": f"{name}.yaml"} for name in stages],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


def run(recipe: Path, folder: Path, *, devices: int, kill_at: str = "") -> int:
    """Give the command in a process group of its own; returns its exit status."""
    words = ["fit", "--config", recipe, "--run_dir", folder]
    log = folder.parent / f"{folder.name}.log"
    return start_command(words, log, ranks=devices, environment={"KILL_AT": kill_at}).wait(150)


def ledgers(folder: Path) -> dict[tuple[str, int, int, int], tuple[Any, ...]]:
    """(stage, epoch, batch, rank) -> keys and loss; what was trained again after a kill was the same."""
    found: dict[tuple[str, int, int, int], tuple[Any, ...]] = {}
    for path in sorted(folder.glob("*/ledger-*.jsonl")):
        rank = int(path.stem.split("-")[1])
        for line in map(json.loads, path.read_text().splitlines()):
            place = (path.parent.name, line["epoch"], line["batch"], rank)
            value = (tuple(line["keys"]), line["loss"])
            assert found.setdefault(place, value) == value, place
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """What the stages left, but for the time they took."""
    paths = [folder / f"{number}-{name}/hf/stage.json" for number, name in enumerate(STAGES, start=1)]
    found = [json.loads(path.read_text()) for path in paths]
    for record in found:
        del record["seconds"]
        record["settings"]["init_from"] = None
    return found


def test_one_process_killed_at_every_point(world, tmp_path):
    """At every second one; `make drills` has all."""
    points = [
        "one:trained", "one:written", "one:ended", "one:exporting", "one:exported",
        "two:setup", "two:unlinked", "three:begun",
    ]  # fmt: skip
    check(world, tmp_path, points if FRESH in os.environ else points[1::2], devices=1)


def test_two_processes_killed_in_each_stage(world, tmp_path):
    check(world, tmp_path, ["one:written", "two:exporting"], devices=2)


def check(world: Any, root: Path, points: list[str], *, devices: int) -> None:
    recipe = write_recipe(world, root, devices)
    assert run(recipe, root / "whole", devices=devices) == 0, (root / "whole.log").read_text()[-3000:]
    broken, finished = root / "broken", {}
    for point in points:
        status = run(recipe, broken, devices=devices, kill_at=point)
        assert status == -signal.SIGKILL, f"{point}: {status}; {(root / 'broken.log').read_text()[-3000:]}"
        finished |= {path: finished.get(path, path.stat().st_mtime_ns) for path in broken.glob("*/hf/stage.json")}
    assert run(recipe, broken, devices=devices) == 0, (root / "broken.log").read_text()[-3000:]
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written, "a finished stage was run again"
    assert ledgers(broken) == ledgers(root / "whole")
    assert len(ledgers(broken)) == 3 * 3 * 2, "three stages of three steps of two micro batches"
    assert records(broken) == records(root / "whole")
    for number, record in enumerate(records(broken)):
        assert (record["steps"], record["samples_seen"]) == (3, {"made": 12})
        assert (record["parent"] or {}).get("stage") == (STAGES[number - 1] if number else None)
    for stage in broken.iterdir():
        assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == [
            "last.ckpt",
            "step00000003.ckpt",
        ]
        assert not [path for path in stage.iterdir() if path.name.endswith((".partial", ".old"))]
