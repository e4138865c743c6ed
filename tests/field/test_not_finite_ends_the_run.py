"""A loss, gradient or weight that is not finite ends the run and is never saved, exported or taken over.

Sources: haotian-liu/LLaVA#1278, huggingface/nanoVLM#187, Lightning-AI/pytorch-lightning#20708, #1008, PR#1097.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignvlm_pl.cli import main
from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.training.export import weights_sha256
from alignvlm_pl.training.module import AlignVLMModule
from callbacks.data_health import DataHealth
from callbacks.finite_losses import FiniteLosses
from tests.integration.checkpoint_files import error_of

OPTIONS = ["--benchmark.at_stage_end=false", "--checkpoint_every_n_steps=1"]


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any, *, step: int) -> None:
    """Change the loss sum of the first micro batch of a step, counted from 1."""
    batch_loss = AlignVLMModule.batch_loss

    def spoiled(self: Any, batch: Any) -> Any:
        loss, sums = batch_loss(self, batch)
        if self.trainer.global_step == step - 1:
            loss = loss._replace(total=change(loss.total))
        return loss, sums

    monkeypatch.setattr(AlignVLMModule, "batch_loss", spoiled)


def finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())


def test_learning_rates_that_explode_end_the_run_with_step_keys_and_part(world, tmp_path, capsys):
    rates = [f"--stage.lr_{part}=1e30" for part in ("llm", "connector", "vision")]
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *OPTIONS, *rates, "--stage.max_steps=8"))
    assert re.search(
        r"step \d: the loss of 'train-\d+', .* is not finite; gradient norm vision nan, connector nan, llm nan", error
    )
    assert not (tmp_path / "hf").exists()
    assert finite(tmp_path / "checkpoints/last.ckpt")
    step = int(re.search(r"step (\d)", error)[1])
    ledger = (tmp_path / "ledger/rank00000.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in ledger]
    assert [line["loss"] for line in lines if line.get("step") == step] == [None, None], "null, which JSON has"
    capsys.readouterr()
    assert main(["replay", "--run", str(tmp_path), "--step", str(step), "--json", "--samples_only"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert main(["replay", "--run", str(tmp_path), "--step", str(step), "--samples_only"]) == 0


@pytest.mark.parametrize(
    "change", [lambda loss: loss * math.nan, lambda loss: loss + math.inf, lambda loss: loss * 1e-30 * 1e30**3]
)
def test_one_step_keeps_the_checkpoint_before_it(world, tmp_path, capsys, monkeypatch, change):
    """The second: an infinite loss whose gradient is finite."""
    spoil(monkeypatch, change, step=3)
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *OPTIONS, "--stage.gradient_clip_norm=null"))
    assert error.startswith("error: step 3: ")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step00000002.ckpt"]
    assert finite(tmp_path / "checkpoints/last.ckpt")
    assert not (tmp_path / "hf").exists()


def test_weights_that_overflow_in_the_last_step_are_not_saved(world, tmp_path, capsys, monkeypatch):
    def overflow(self: Any, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            module.net.connector.w1.weight.data[0, 0] = math.inf

    monkeypatch.setattr(DataHealth, "on_train_batch_end", overflow)
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *OPTIONS))
    assert "step 3 is not saved: weight connector.w1.weight holds nan or inf" in error
    assert finite(tmp_path / "checkpoints/last.ckpt")
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def diverged(trained: Path, tmp_path: Path) -> Path:
    """The run folder of a version that did not look: a weight of its export and checkpoint is nan."""
    folder = tmp_path / "diverged"
    shutil.copytree(trained, folder, symlinks=True)
    weights = folder / "hf/model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).flatten()[0] = math.nan
    save_file(state, weights, metadata={"format": "pt"})
    record = json.loads((folder / "hf/stage.json").read_text()) | {"weights_sha256": weights_sha256(folder / "hf")}
    (folder / "hf/stage.json").write_text(json.dumps(record))
    last = (folder / "checkpoints/last.ckpt").resolve()
    state = torch.load(last, weights_only=True)
    next(iter(state["state_dict"].values())).flatten()[0] = math.nan
    torch.save(state, last)
    return folder


@pytest.mark.parametrize(
    ("command", "option", "path"),
    [
        ("fit", "stage.init_from", "hf"),
        ("fit", "model.weights", "hf"),
        ("test", "model.weights", "hf"),
        ("validate", "model.weights", "hf"),
        ("predict", "ckpt_path", "checkpoints/last.ckpt"),
    ],
)
def test_weights_that_are_not_finite_are_not_taken_over(world, diverged, tmp_path, capsys, command, option, path):
    run = tmp_path / "run"
    error = error_of(capsys, world.run(command, "--run_dir", run, *OPTIONS, f"--{option}", diverged / path))
    assert f"{option}={diverged / path}: weight " in error
    assert "holds nan or inf" in error
    assert not list(run.glob("checkpoints/*"))


def test_such_a_checkpoint_is_not_exported(world, diverged, tmp_path, capsys):
    error = error_of(capsys, main(["export", str(diverged), str(tmp_path / "out")]))
    assert "holds nan or inf" in error
    assert not (tmp_path / "out").exists()


HUGE = [f"--stage.lr_{part}=1e30" for part in ("llm", "connector", "vision")] + ["--stage.warmup_share=0"]


@pytest.mark.parametrize("validated", [True, False])
def test_a_last_step_after_which_the_loss_is_not_finite_is_not_saved(world, tmp_path, capsys, validated):
    """The weights are finite, and the step's own loss is that of before."""
    options = [] if validated else ["--benchmark.at_stage_end=false"]
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *options, *HUGE, "--stage.max_steps=1"))
    assert "train/loss is not finite after step 1: " in error
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob("checkpoints/*.ckpt"))


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_weights_with_which_the_loss_is_not_finite_end_a_validation(world, trained, tmp_path, capsys, command):
    weights = tmp_path / "hf"
    shutil.copytree(trained / "hf", weights)
    state = load_file(weights / "model.safetensors")
    state = {name: value * 1e30 if value.is_floating_point() else value for name, value in state.items()}
    save_file(state, weights / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((weights / "stage.json").read_text()) | {"weights_sha256": weights_sha256(weights)}
    (weights / "stage.json").write_text(json.dumps(record))
    sanity = ["--trainer.num_sanity_val_steps=1"] if command == "fit" else []
    options = ["--run_dir", tmp_path / "run", *OPTIONS, "--model.weights", weights, *sanity]
    error = error_of(capsys, world.run(command, *options))
    assert "val/held/loss is not finite after step " in error


def test_adapters_whose_merged_weights_are_not_finite_are_not_exported(world, tmp_path, capsys):
    """Both factors are finite, their product is not."""
    lora = ["--stage.lora={llm: {r: 4, alpha: 400000}}", "--stage.lr_llm=1e36", "--stage.lr_vision=null"]
    options = [*OPTIONS, *lora, "--stage.lr_connector=null", "--stage.max_steps=1", "--stage.warmup_share=0"]
    with pytest.MonkeyPatch.context() as patch:  # which would end the run before
        patch.setattr(FiniteLosses, "on_train_batch_end", lambda *_: None)
        error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *options))
    assert "hf is not written: merged adapters: weight " in error and not (tmp_path / "hf").exists()


def test_an_average_that_is_not_finite_is_not_resumed(world, tmp_path, capsys):
    ema = ["--stage.ema_decay=0.5", "--checkpoint_every_n_steps=1"]
    run = world.cut(tmp_path / "run", *ema, step=2)
    last = (run / "checkpoints/last.ckpt").resolve()
    state = torch.load(last, weights_only=True)
    name = next(iter(state["state_dict"]))
    state["state_dict"][name].flatten()[0] = math.nan
    torch.save(state, last)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert f"weight {name} holds nan or inf" in error_of(capsys, world.run("fit", "--run_dir", run, *OPTIONS, *ema))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    with pytest.raises(CheckpointError, match="holds nan or inf"):
        AlignVLMModule.load_from_checkpoint(last)


def test_a_stage_without_a_step_is_an_error(world, tmp_path, capsys):
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path, *OPTIONS, "--trainer.max_time={minutes: 0}"))
    assert "no step was trained, so nothing is exported" in error
