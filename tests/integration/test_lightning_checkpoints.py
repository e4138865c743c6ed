"""Lightning's own checkpoints, early stopping and limits in a configuration do what its manual says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.checkpoint_files import names

CALLBACKS = "lightning.pytorch.callbacks."


def with_callbacks(world: Any, folder: Path, **callbacks: dict[str, Any]) -> str:
    """Option that adds callbacks of Lightning, given by class and arguments."""
    cpu = yaml.safe_load((world.root / "cpu.yaml").read_text())
    listed = [{"class_path": CALLBACKS + name, "init_args": args} for name, args in callbacks.items()]
    path = folder / "trainer.yaml"
    path.write_text(yaml.safe_dump({**cpu, "callbacks": listed}))
    return f"--trainer={path}"


def steps(folder: Path) -> int:
    return int(json.loads((folder / "hf/stage.json").read_text())["steps"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # `test` has no such callback
def test_the_best_checkpoint_by_a_metric_comes_beside_ours(world, tmp_path):
    best = {"monitor": "train/loss", "filename": "best", "every_n_train_steps": 1, "save_top_k": 1}
    folder = world.fit(tmp_path / "run", with_callbacks(world, tmp_path, ModelCheckpoint=best))
    assert names(folder) == ["best.ckpt", "last.ckpt", "step00000003.ckpt"]
    # It is whole: the run can be resumed from it, and tested.
    assert world.run("test", "--run_dir", tmp_path / "test", f"--ckpt_path={folder / 'checkpoints/best.ckpt'}") == 0


def test_checkpoints_by_the_clock(world, tmp_path):
    often = {"train_time_interval": "0:00:00", "save_top_k": -1, "filename": "clock-{step}"}
    folder = world.fit(tmp_path / "run", with_callbacks(world, tmp_path, ModelCheckpoint=often))
    assert {"clock-step=1.ckpt", "clock-step=2.ckpt", "clock-step=3.ckpt"} <= set(names(folder))


def test_early_stopping_ends_a_stage_which_is_exported_and_not_trained_on(world, tmp_path, caplog, monkeypatch):
    from alignvlm_pl.training.module import AlignVLMModule

    stop = {
        "monitor": "train/loss",
        "patience": 0,
        "divergence_threshold": 0.0,
        "check_on_train_epoch_end": True,
    }
    options = [
        with_callbacks(world, tmp_path, EarlyStopping=stop),
        "--stage.max_steps=20",
        f"--data.init_args.train=[{world.root / 'held'}]",
    ]
    folder = world.fit(tmp_path / "run", *options)
    ended = steps(folder)
    assert 0 < ended < 20
    (folder / "hf/stage.json").unlink()  # killed before the export
    calls: list[int] = []
    step = AlignVLMModule.training_step
    monkeypatch.setattr(AlignVLMModule, "training_step", lambda self, *batch: calls.append(1) or step(self, *batch))
    caplog.set_level(logging.INFO)
    world.fit(folder, *options)
    assert calls == []
    assert steps(folder) == ended
    assert f"stage all ended early, at step {ended}" in caplog.text


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--trainer.max_steps=1", 1),
        ("--trainer.max_epochs=2", 8),
        ("--trainer.accumulate_grad_batches=4", 3),
    ],
)
def test_a_limit_of_the_trainer_wins_over_the_stages(world, tmp_path, caplog, option, expected):
    folder = world.fit(tmp_path / "run", option)
    assert steps(folder) == expected
    key = option.removeprefix("--").split("=")[0]
    assert f"{key}=" in caplog.text
    seen = json.loads((folder / "hf/stage.json").read_text())["samples_seen"]["made"]
    assert seen == expected * (8 if "accumulate" in option else 4)


def test_the_stage_ends_at_max_time(world, tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import Timer

    elapsed = Timer.time_elapsed
    # An hour of a training step: each of the trainer's Timer has passed at the end of the first.
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, *stage: elapsed(self, *stage) + 3600 * (self.steps > 0))
    monkeypatch.setattr(Timer, "steps", 0, raising=False)
    end = Timer.on_train_batch_end

    def counted(self: Any, trainer: Any, *rest: Any, **named: Any) -> None:
        self.steps = trainer.global_step
        end(self, trainer, *rest, **named)

    monkeypatch.setattr(Timer, "on_train_batch_end", counted)
    assert steps(world.fit(tmp_path / "run", "--trainer.max_time=00:00:05:00")) == 1


def test_predict_stops_at_its_limit(world, tmp_path):
    assert world.run("predict", "--run_dir", tmp_path, "--trainer.limit_predict_batches=1") == 0
    lines = (tmp_path / "predictions" / "held.jsonl").read_text().splitlines()
    assert len(lines) == 2, "one batch of two of five samples"


def test_fast_dev_run_trains_and_validates_a_batch_and_leaves_nothing(world, tmp_path, validated):
    world.fit(tmp_path / "run", "--trainer.fast_dev_run=true")
    assert validated == [0], "of three"
    assert not list((tmp_path / "run").iterdir())


def test_a_metric_that_is_not_logged_is_answered_in_one_line(world, tmp_path, capsys):
    best = {"monitor": "bench/hold/anls", "mode": "max", "dirpath": str(tmp_path / "best")}
    options = [with_callbacks(world, tmp_path, ModelCheckpoint=best), "--benchmark.every_n_steps=1"]
    assert world.run("fit", "--run_dir", tmp_path / "run", *options) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: `ModelCheckpoint(monitor='bench/hold/anls')` could not find the monitored key")
    assert "'bench/held/anls'" in said


def test_a_resumed_run_says_so(world, tmp_path, caplog):
    folder = world.cut(tmp_path / "run", "--checkpoint_every_n_steps=1")
    caplog.set_level(logging.INFO)
    world.fit(folder)
    assert f"stage all: resumed from {folder / 'checkpoints/last.ckpt'}, after step 2 of 3" in caplog.text
