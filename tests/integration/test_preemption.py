"""SIGUSR1 and SIGTERM to real runs of three stages: they leave with 85, and the same command goes on."""

from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.cli.slurm import REFUSED
from alignvlm_pl.stop_request import EXIT_CODE
from tests.drills.stages import compare, fit, with_signals, write_recipe

STEPS = 3
SHARDED = "alignvlm_pl.parallel.ShardedStrategy"
# Five samples to validate on and to answer, every second step.
VALIDATED = ["--trainer.limit_val_batches=1.0", "--trainer.check_val_every_n_epoch=null"]
LOOKS = ["--benchmark.every_n_steps=2", "--benchmark.subset=4", "--benchmark.max_new_tokens=2"]


def validations(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each validation of a stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("val/held/loss")]


def left_at(text: str) -> list[str]:
    return [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("asked to stop")]


def stopped(
    tmp_path: Path,
    places: list[dict[str, Any]],
    options: list[str],
    *,
    world: int,
    stages: int,
    strategy: str = "ddp",
) -> list[str]:
    """Run unbroken, then with a signal at each place; compares all that was trained, and returns where it left."""
    command = [*write_recipe(tmp_path, steps=STEPS, stages=stages), *options]
    whole = fit(tmp_path / "whole", command, world=world, strategy=strategy)
    assert whole.returncode == 0, whole.stderr[-3000:]
    with_signals(tmp_path, *places)
    told = []
    while (done := fit(tmp_path / "broken", command, world=world, strategy=strategy)).returncode == EXIT_CODE:
        assert "Traceback" not in done.stderr
        told += left_at(done.stderr)
        assert len(told) <= len(places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert compare(tmp_path / "broken", tmp_path / "whole") == stages * STEPS * 2
    return told


@pytest.mark.slow
def test_a_signal_anywhere_leaves_with_85_and_nothing_is_trained_twice(tmp_path):
    places = [
        {"place": "setup", "stage": "1-first"},
        {"place": "step", "stage": "1-first", "step": 1},
        {"place": "saving", "stage": "1-first", "step": 2, "signals": ["SIGUSR1", "SIGTERM", "SIGUSR1"]},
        {"place": "train_end", "stage": "1-first", "step": 3, "signals": ["SIGTERM"], "group": True},
        {"place": "fit_end", "stage": "2-second", "step": 3},
        {"place": "step", "stage": "3-third", "step": 0, "signals": ["SIGTERM"], "group": True},
        {"place": "step", "stage": "3-third", "step": 1},  # twice in a row
    ]
    told = stopped(tmp_path, places, [], world=1, stages=3)
    assert told == [f"left after step {step}" for step in (0, 2, 3, 3, 1, 2)], (
        "that while saving adds no stop"
    )


@pytest.mark.slow
def test_validation_is_left_at_its_next_batch_and_run_again(tmp_path):
    places = [
        {"place": "validation", "stage": "1-first", "step": 1},
        {"place": "validation", "stage": "1-first", "step": 2, "rank": 1, "signals": ["SIGTERM"]},
    ]
    # Two ranks take a step in one micro batch.
    told = stopped(tmp_path, places, [*VALIDATED, "--trainer.val_check_interval=1"], world=2, stages=1)
    assert told == ["left after step 1", "left after step 2"]
    found = validations(tmp_path / "broken" / "1-first")
    assert found == validations(tmp_path / "whole" / "1-first")
    assert [step for step, _ in found] == [1, 2, 3]


@pytest.mark.slow
def test_a_validation_is_run_again_also_where_its_step_was_just_saved(tmp_path):
    places = [{"place": "validation", "stage": "1-first", "step": 2}]
    options = [*VALIDATED, "--trainer.val_check_interval=2", "--checkpoint_every_n_steps=1"]
    assert stopped(tmp_path, places, options, world=1, stages=1) == ["left after step 2"]
    found = validations(tmp_path / "broken" / "1-first")
    assert found == validations(tmp_path / "whole" / "1-first")
    assert [step for step, _ in found] == [1, 2, 3]


@pytest.mark.slow
def test_one_rank_s_signal_stops_all_and_cuts_the_benchmarks_short(tmp_path):
    places = [
        {"place": "step", "stage": "1-first", "step": 1, "rank": 1},
        {"place": "fit_end", "stage": "1-first", "step": 3, "rank": 1, "signals": ["SIGTERM"]},
        {"place": "step", "stage": "2-second", "step": 2, "group": True},
    ]
    told = stopped(tmp_path, places, LOOKS, world=2, stages=2)
    assert told == ["left after step 2", "left after step 3", "left after step 3"]
    looks = {run: sorted((tmp_path / run).rglob("held-step*.jsonl")) for run in ("whole", "broken")}
    assert [path.parts[-3] for path in looks["whole"]] == ["1-first", "2-second"]
    assert [path.parts[-3] for path in looks["broken"]] == ["2-second"], "the first look is cut short"


@pytest.mark.slow
def test_a_sharded_run_is_stopped_by_one_rank_s_signal(tmp_path):
    places = [
        {"place": "step", "stage": "1-first", "step": 0, "rank": 1},
        {"place": "saving", "stage": "1-first", "step": 1, "rank": 1, "signals": ["SIGTERM"]},
    ]
    told = stopped(tmp_path, places, [], world=2, stages=1, strategy=SHARDED)
    assert told == ["left after step 1"]


def test_a_requeued_job_that_finds_its_stage_finished_ends_well(world, tmp_path, monkeypatch, capsys):
    """The node may be lost between the stage's end and the job's."""
    (tmp_path / "run/hf").mkdir(parents=True)
    (tmp_path / "run/hf/stage.json").write_text("{}")
    for name, value in {"NTASKS": "1", "NNODES": "1", "NTASKS_PER_NODE": "1", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert world.run("fit", "--run_dir", tmp_path / "run") == REFUSED
    assert "holds a finished stage" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as ended:
        world.run("fit", "--run_dir", tmp_path / "run")
    assert ended.value.code == 0
