"""`validate` killed half way resumes where it stopped, on one and on two processes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.drills.launch import Process, start_command

from .conftest import write_set

ROOT = Path(__file__).parents[2]
SAMPLES = 30


def validate(run: Path, *options: Any, ranks: int) -> Process:
    return start_command(["validate", *options, "--run_dir", run], run.with_suffix(".log"), ranks=ranks)


def answers(run: Path) -> dict[str, dict[str, Any]]:
    lines = (run / "predictions/many.jsonl").read_text().splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_evaluation_resumes(world, tmp_path, devices):
    write_set(tmp_path / "many", SAMPLES, samples_per_shard=8)
    sets = json.dumps({"many": str(tmp_path / "many")})
    options = [
        *world.options("--data.init_args.benchmarks", sets, "--data.init_args.val", "{}"),
        "--data.init_args.eval_batch_size=1",
        "--trainer.devices=1",
    ]
    assert validate(tmp_path / "whole", *options, ranks=1).wait(200) == 0
    expected = answers(tmp_path / "whole")
    assert len(expected) == SAMPLES

    run = tmp_path / "killed"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"] if devices == 2 else []
    process = validate(run, *options, *two, ranks=devices)
    journal = run / "predictions/journal/many"
    kept = wait_for_lines(process, journal, 1 + 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert not (run / "results.json").exists()
    # A mark in an answer that is on disk, and half a line as a kill may leave it.
    first, header = json.loads(kept[1]), kept[0]
    first["record"]["prediction"] = "answered before the kill"
    path = journal / "rank0.jsonl"
    path.write_text(
        "".join(
            [header, json.dumps(first) + "\n", *kept[2:], '{"position": 2'],
        )
    )

    assert validate(run, *options, *two, ranks=devices).wait(200) == 0
    found = answers(run)
    assert found.keys() == expected.keys()
    different = [key for key in found if found[key]["prediction"] != expected[key]["prediction"]]
    assert different == [first["record"]["key"]]
    assert json.loads((run / "results.json").read_text())["benchmarks"]["many"]["num"] == SAMPLES
    assert not (run / "predictions/journal").exists()


@pytest.mark.slow
def test_answers_of_other_settings_are_not_taken(world, tmp_path):
    run = tmp_path / "run"
    journal = run / "predictions/journal/held"
    journal.mkdir(parents=True)
    record = {"key": "held-00000000", "question": "", "prediction": "stale", "references": ["0"], "meta": {}}
    lines = [{"weights": "others"}, {"position": 0, "record": record}]
    (journal / "rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert world.run("validate", "--run_dir", run) == 0
    assert "stale" not in (run / "predictions/held.jsonl").read_text()


def wait_for_lines(process: Process, journal: Path, count: int) -> list[str]:
    """Whole lines of rank 0's journal, as soon as there are so many."""
    for _ in range(6000):
        path = journal / "rank0.jsonl"
        lines = list(path.read_text().splitlines(keepends=True)) if path.is_file() else []
        if len(lines) > count:
            return lines[:count]
        assert process.poll() is None, "the run has ended"
        time.sleep(0.01)
    raise AssertionError("no answers came")
