"""Whatever is logged can be monitored by Lightning's callbacks, and what they refuse is one line.

Sources: lightly-ai/lightly-train#247, Lightning-AI/pytorch-lightning#8455, #18259, #18481, #3811, #405, #10290, #1252.
"""

import json
from typing import Any

import lightning.pytorch as pl
import pytest

from callbacks.data_health import DataHealth

CALLBACKS = "--trainer.callbacks+=lightning.pytorch.callbacks."


def test_what_the_loggers_get_is_in_the_callback_metrics(world, tmp_path, monkeypatch):
    logged: set[str] = set()
    monitored: set[str] = set()
    log = pl.loggers.TensorBoardLogger.log_metrics

    def noted(self: Any, metrics: Any, step: Any = None) -> None:
        logged.update(metrics)
        log(self, metrics, step)

    monkeypatch.setattr(pl.loggers.TensorBoardLogger, "log_metrics", noted)
    monkeypatch.setattr(
        DataHealth,
        "on_train_end",
        lambda self, trainer, module: monitored.update(trainer.callback_metrics),
        raising=False,
    )
    assert world.run("fit", "--run_dir", tmp_path, "--connector_health.every_n_steps=1") == 0
    expected = {
        "train/loss",
        "train/loss/made",
        "perf/tokens_per_s",
        "data/padding_share",
        "lr/llm",
        "connector/entropy",
    }
    assert expected | {"val/held/loss", "bench/held/anls", "train/gradient_norm/llm"} <= logged
    assert logged <= monitored


@pytest.mark.parametrize("metric", ["perf/tokens_per_s", "val/held/loss", "bench/held/anls"])
def test_the_best_checkpoint_is_kept_by_any_of_them(world, tmp_path, metric):
    options = [f"{CALLBACKS}ModelCheckpoint", f"--trainer.callbacks.monitor={metric}", "--stage.max_steps=1"]
    assert world.run("fit", "--run_dir", tmp_path, *options) == 0
    found = [path for path in tmp_path.rglob("*.ckpt") if "step=" in path.name]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([f"{CALLBACKS}EarlyStopping", "--trainer.callbacks.monitor=val/nope"], "`val/nope` which is not available"),
        ([f"{CALLBACKS}ModelCheckpoint", "--trainer.callbacks.monitor=val/nope"], "could not find the monitored key"),
        (["--trainer.val_check_interval=100"], "`val_check_interval` (100) must be less than or equal to the number"),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval=0: expected a number above 0"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch=0: expected a number above 0"),
        (["--trainer.accumulate_grad_batches=-1"], "accumulate_grad_batches=-1: expected a number above 0"),
        (["--trainer.limit_train_batches=0"], "limit_train_batches=0: expected a number above 0"),
        (["--trainer.max_steps=0"], "max_steps=0: expected a number above 0"),
        (["--trainer.check_val_every_n_epoch=-1"], "check_val_every_n_epoch=-1: expected a number above 0"),
        (["--trainer.gradient_clip_val=-1"], "gradient_clip_val=-1: expected a number above 0"),
        (["--trainer.gradient_clip_val=0"], "gradient_clip_val=0: expected a number above 0"),
        (["--trainer.log_every_n_steps=-1"], "log_every_n_steps=-1: expected at least 0"),
        (["--trainer.num_sanity_val_steps=-5"], "num_sanity_val_steps=-5: expected at least -1"),
        (["--trainer.enable_checkpointing=false"], "enable_checkpointing=false: a stage is exported from its last"),
        ([f"{CALLBACKS}EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks.mode=foo"], "got foo"),
    ],
)
def test_a_refusal_of_lightning_is_one_line(world, tmp_path, capsys, options, expected):
    assert world.run("fit", "--run_dir", tmp_path, *options, "--stage.max_steps=1") == 1
    printed = capsys.readouterr().err
    assert expected in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_overfitting_takes_the_same_batch(world, tmp_path):
    """Lightning-AI/pytorch-lightning#10457, #2311, #10302."""
    run = world.fit(tmp_path, "--trainer.overfit_batches=1")
    lines = map(json.loads, (run / "ledger/rank00000.jsonl").read_text().splitlines())
    keys = [line["keys"] for line in lines if "step" in line]
    assert len(keys) == 3
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_a_progress_bar_of_the_users_takes_the_place_of_ours(world, tmp_path, monkeypatch, bar):
    found: list[str] = []
    monkeypatch.setattr(
        DataHealth,
        "on_train_end",
        lambda self, trainer, module: found.append(type(trainer.progress_bar_callback).__name__),
        raising=False,
    )
    options = [f"{CALLBACKS}{bar}", "--trainer.enable_progress_bar=true", "--stage.max_steps=1"]
    assert world.run("fit", "--run_dir", tmp_path, *options) == 0
    assert found == [bar]
