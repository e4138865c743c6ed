"""SIGUSR1 and SIGTERM to real runs of three stages: they leave with 85, and the same command goes on."""

from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.cli.slurm import REFUSED
from alignvlm_pl.utils.stop_signals import EXIT_CODE
from tests.drills.stages import compare, fit, with_signals, write_recipe

STEPS = 3
SHARDED = "alignvlm_pl.strategies.fsdp.ShardedStrategy"
# Five samples to validate on, and predictions for the first four.
VALIDATED = ["--trainer.limit_val_batches=1.0", "--trainer.check_val_every_n_epoch=null"]
LOOKS = ["--benchmark.every_n_steps=1", "--benchmark.subset=4", "--benchmark.max_new_tokens=2"]


def figures(run: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a tag of TensorBoard; what two processes have said alike stands there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return sorted({(event.step, event.value) for event in events.Scalars(tag)})


def left_at(text: str) -> list[str]:
    return [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("asked to stop")]


def stopped(
    tmp_path: Path,
    places: list[dict[str, Any]],
    options: list[str],
    *,
    world: int,
    stages: int,
    steps: int = STEPS,
    strategy: str = "ddp",
) -> list[str]:
    """Run unbroken, then with a signal at each place; compares all that was trained, and returns where it left."""
    command = [*write_recipe(tmp_path, steps=steps, stages=stages), *options]
    whole = fit(tmp_path / "whole", command, world=world, strategy=strategy)
    assert whole.returncode == 0, whole.stderr[-3000:]
    with_signals(tmp_path, *places)
    told = []
    while (done := fit(tmp_path / "broken", command, world=world, strategy=strategy)).returncode == EXIT_CODE:
        assert "Traceback" not in done.stderr
        told += left_at(done.stderr)
        assert len(told) <= len(places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert compare(tmp_path / "broken", tmp_path / "whole") == stages * steps * 2
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
@pytest.mark.parametrize("strategy", ["ddp", SHARDED])
def test_two_ranks_are_stopped_in_two_stages_and_between_them(tmp_path, strategy):
    places = [
        {"place": "step", "stage": "1-first", "step": 1, "rank": 1},  # a benchmark was to follow it
        {"place": "saving", "stage": "1-first", "step": 2, "rank": 1, "signals": ["SIGTERM", "SIGUSR1"]},
        {"place": "fit_end", "stage": "1-first", "step": 3, "rank": 1, "signals": ["SIGTERM"]},
        {"place": "validation", "stage": "2-second", "step": 1, "rank": 1, "signals": ["SIGTERM"]},
        {"place": "step", "stage": "2-second", "step": 1, "group": True},  # twice in a row
    ]
    options = [VALIDATED[0], *LOOKS]
    told = stopped(tmp_path, places, options, world=2, stages=2, strategy=strategy)
    assert told == [f"left after step {step}" for step in (2, 3, 1, 2)], "that while saving adds no stop"
    for stage in ("1-first", "2-second"):
        broken, whole = (tmp_path / name / stage for name in ("broken", "whole"))
        assert figures(broken, "val/held/loss") == figures(whole, "val/held/loss")
        assert [step for step, _ in figures(whole, "val/held/loss")] == [1, 2, 3]
        look = "predictions/held-step000002.jsonl"
        assert (broken / look).read_text() == (whole / look).read_text()


@pytest.mark.slow
def test_a_stage_of_epochs_that_is_stopped_at_their_ends_has_as_many(tmp_path):
    places = [
        {"place": "step", "stage": "1-first", "step": 1},
        {"place": "validation", "stage": "1-first", "step": 2},
        {"place": "step", "stage": "1-first", "step": 3},
    ]
    # Two steps an epoch; it ends with a validation.
    options = ["--stage.max_steps=null", "--stage.epochs=2", f"--data.init_args.train=[{tmp_path}/sets/c]"]
    told = stopped(tmp_path, places, [*options, VALIDATED[0]], world=1, stages=1, steps=4)
    assert told == [f"left after step {step}" for step in (2, 2, 4)]
    broken, whole = (tmp_path / name / "1-first" for name in ("broken", "whole"))
    for tag, steps in (("val/held/loss", [2, 4]), ("train/loss", [1, 2, 3, 4])):
        assert figures(broken, tag) == figures(whole, tag)
        assert [step for step, _ in figures(whole, tag)] == steps


@pytest.mark.slow
def test_nothing_is_left_out_of_validation_and_benchmarks(tmp_path):
    places = [
        {"place": "step", "stage": "1-first", "step": 0},
        {"place": "validation", "stage": "1-first", "step": 2},
        {"place": "step", "stage": "1-first", "step": 2},  # the last one
        {"place": "validation", "stage": "1-first", "step": 3},
        {"place": "train_end", "stage": "1-first", "step": 3},
    ]
    options = [*VALIDATED, "--trainer.val_check_interval=2", "--checkpoint_every_n_steps=2"]
    options += ["--benchmark.at_stage_end=true", "--benchmark.subset=null", "--benchmark.max_new_tokens=2"]
    told = stopped(tmp_path, places, options, world=1, stages=1)
    assert told == [f"left after step {step}" for step in (1, 2, 3, 3, 3)]
    broken, whole = (tmp_path / name / "1-first" for name in ("broken", "whole"))
    for tag in ("val/held/loss", "train/loss"):
        assert figures(broken, tag) == figures(whole, tag)
        assert [step for step, _ in figures(whole, tag)] == [1, 2, 3]
    assert figures(broken, "bench/held/num") == figures(whole, "bench/held/num")
    assert figures(whole, "bench/held/num") == [(1, 5.0), (2, 5.0), (3, 5.0)]
    assert (broken / "results.json").read_text() == (whole / "results.json").read_text()


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
