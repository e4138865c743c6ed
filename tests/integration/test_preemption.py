"""SIGUSR1 and SIGTERM to real runs of three stages: they leave with 85, and the same command resumes."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.cli.slurm import REFUSED
from alignvlm_pl.utils.stop_signals import EXIT_CODE
from tests.drills.launch import FRESH
from tests.drills.stages import compare, fit, with_signals, write_recipe

STEPS = 3
SHARDED = "alignvlm_pl.strategies.fsdp.ShardedStrategy"
# Five samples to validate on, and predictions for the first four.
VALIDATED = ["--trainer.limit_val_batches=1.0", "--trainer.check_val_every_n_epoch=null"]
LOOKS = ["--benchmark.every_n_steps=1", "--benchmark.subset=4", "--benchmark.max_new_tokens=2"]


def logged(run: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a tag of TensorBoard; what two processes have said alike stands there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return sorted({(event.step, event.value) for event in events.Scalars(tag)})


def left_at(text: str) -> list[str]:
    """What the run says when it leaves: after which step, and which validation it leaves out."""
    found = [
        re.match(r"asked to stop.*: (left after step \d+)|(validation after step \d+) is skipped", line)
        for line in text.splitlines()
    ]
    return [match[1] or match[2] for match in found if match]


def without(values: list[tuple[int, float]], *steps: int) -> list[tuple[int, float]]:
    return [(step, value) for step, value in values if step not in steps]


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
    assert whole.returncode == 0, whole.output[-3000:]
    with_signals(tmp_path, *places)
    output = []
    while (done := fit(tmp_path / "broken", command, world=world, strategy=strategy)).returncode == EXIT_CODE:
        assert "Traceback" not in done.output
        output += left_at(done.output)
        assert sum(word.startswith("left") for word in output) <= len(places)
    assert done.returncode == 0, done.output[-3000:]
    assert compare(tmp_path / "broken", tmp_path / "whole") == stages * steps * 2
    return output


ANYWHERE: list[tuple[dict[str, Any], int]] = [  # where signals are sent, and after which step the run leaves
    ({"place": "setup", "stage": "1-first"}, 0),
    ({"place": "step", "stage": "1-first", "step": 1}, 2),
    # While the checkpoint of the first signal is written: it adds no stop.
    ({"place": "saving", "stage": "1-first", "step": 2, "signals": ["SIGUSR1", "SIGTERM", "SIGUSR1"]}, 0),
    ({"place": "train_end", "stage": "1-first", "step": 3, "signals": ["SIGTERM"], "group": True}, 3),
    ({"place": "fit_end", "stage": "2-second", "step": 3}, 3),
    ({"place": "step", "stage": "3-third", "step": 0, "signals": ["SIGTERM"], "group": True}, 1),
    ({"place": "step", "stage": "3-third", "step": 2}, 3),  # the last one
]


@pytest.mark.slow
def test_a_signal_anywhere_leaves_with_85_and_nothing_is_trained_twice(tmp_path):
    """At some places; `make drills` has all."""
    chosen = ANYWHERE if FRESH in os.environ else ANYWHERE[:4]
    output = stopped(tmp_path, [place for place, _ in chosen], [], world=1, stages=3)
    assert output == [f"left after step {step}" for place, step in chosen if place["place"] != "saving"]


PLACES: list[tuple[dict[str, Any], list[str]]] = [  # where signals are sent, and what the run says
    # A validation was to follow it.
    ({"place": "step", "stage": "1-first", "step": 1}, ["validation after step 2", "left after step 2"]),
    # While the checkpoint of the first signal is written: it adds no stop.
    ({"place": "saving", "stage": "1-first", "step": 2, "signals": ["SIGTERM", "SIGUSR1"]}, []),
    ({"place": "fit_end", "stage": "1-first", "step": 3, "signals": ["SIGTERM"]}, ["left after step 3"]),
    (
        {"place": "validation", "stage": "2-second", "step": 1, "signals": ["SIGTERM"]},
        ["validation after step 1", "left after step 1"],
    ),
    # Twice in a row.
    (
        {"place": "step", "stage": "2-second", "step": 1, "group": True},
        ["validation after step 2", "left after step 2"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "chosen", "left_out"),
    [("ddp", (1, 2), ([], [])), (SHARDED, (3, 4), ([], [1, 2]))]
    if FRESH not in os.environ
    else [(strategy, (0, 1, 2, 3, 4), ([2], [1, 2])) for strategy in ("ddp", SHARDED)],
    ids=["ddp", "sharded"],
)
def test_two_ranks_are_stopped_in_two_stages_and_between_them(tmp_path, strategy, chosen, left_out):
    """Each strategy at some places; `make drills` has both at all."""
    places = [PLACES[number][0] | ({} if "group" in PLACES[number][0] else {"rank": 1}) for number in chosen]
    options = [VALIDATED[0], *LOOKS]
    output = stopped(tmp_path, places, options, world=2, stages=2, strategy=strategy)
    assert output == [word for number in chosen for word in PLACES[number][1]]
    for stage, steps in zip(("1-first", "2-second"), left_out, strict=True):
        broken, whole = (tmp_path / name / stage for name in ("broken", "whole"))
        assert logged(broken, "val/held/loss") == without(logged(whole, "val/held/loss"), *steps)
        assert [step for step, _ in logged(whole, "val/held/loss")] == [1, 2, 3]
        look = "predictions/held-step000003.jsonl"
        assert (broken / look).read_text() == (whole / look).read_text()


@pytest.mark.slow
def test_a_stage_of_epochs_that_is_stopped_at_their_ends_has_as_many(tmp_path):
    places = [{"place": "step", "stage": "1-first", "step": step} for step in (1, 3)]
    # Two steps an epoch; it ends with a validation.
    options = ["--stage.max_steps=null", "--stage.epochs=3", f"--data.init_args.train=[{tmp_path}/sets/c]"]
    output = stopped(tmp_path, places, [*options, VALIDATED[0]], world=1, stages=1, steps=6)
    assert output == [
        "validation after step 2", "left after step 2", "validation after step 4", "left after step 4",
    ]  # fmt: skip
    broken, whole = (tmp_path / name / "1-first" for name in ("broken", "whole"))
    assert logged(broken, "train/loss") == logged(whole, "train/loss")
    assert [step for step, _ in logged(whole, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged(whole, "val/held/loss")] == [2, 4, 6]
    assert logged(broken, "val/held/loss") == without(logged(whole, "val/held/loss"), 2, 4)


@pytest.mark.slow
def test_validations_that_a_stop_cuts_off_are_left_out_and_named(tmp_path):
    places = [
        {"place": "step", "stage": "1-first", "step": 0},
        {"place": "validation", "stage": "1-first", "step": 2},
        {"place": "step", "stage": "1-first", "step": 2},  # the last one
    ]
    options = [*VALIDATED, "--trainer.val_check_interval=2", "--checkpoint_every_n_steps=2"]
    output = stopped(tmp_path, places, options, world=1, stages=1)
    assert output == [
        word for step in (1, 2, 3) for word in (f"validation after step {step}", f"left after step {step}")
    ]
    broken, whole = (tmp_path / name / "1-first" for name in ("broken", "whole"))
    assert logged(broken, "train/loss") == logged(whole, "train/loss")
    assert [step for step, _ in logged(whole, "val/held/loss")] == [1, 2, 3]
    assert logged(broken, "val/held/loss") == []


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
