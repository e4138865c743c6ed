"""Frozen weights stay bit-identical through a stage, or it ends with an error; frozen towers stay in eval mode."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

STAGE = ["--stage.lr_vision=null", "--stage.max_steps=3", "--checkpoint_every_n_steps=1"]


class Meddler(pl.Callback):
    """Writes to a frozen weight after the second step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            weight = next(pl_module.net.vision_tower.parameters())
            weight.data.view(-1)[0] *= 1 + 1e-6


class Watcher(pl.Callback):
    """Notes at each step which modules of the parts are in training mode."""

    modes: list[tuple[int, dict[str, set[bool]]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        parts = ("vision_tower", "connector", "language_model")
        found = {part: {m.training for m in getattr(pl_module.net, part).modules()} for part in parts}
        self.modes.append((trainer.current_epoch, found))


def with_callback(world: Any, folder: Path, kind: type) -> str:
    """Option that adds a callback of this file."""
    cpu = yaml.safe_load((world.root / "cpu.yaml").read_text())
    path = folder / "callbacks.yaml"
    path.write_text(
        yaml.safe_dump({**cpu, "callbacks": [{"class_path": f"{kind.__module__}.{kind.__name__}"}]})
    )
    return f"--trainer={path}"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_a_frozen_weight_that_changes_ends_the_stage_without_handing_over(world, tmp_path, capsys):
    options = ["--benchmark.at_stage_end=false", with_callback(world, tmp_path, Meddler)]
    assert world.run("fit", "--run_dir", tmp_path / "run", *STAGE, *options) == 1
    error = error_of(capsys)
    assert "stage 'all' does not train vision_tower." in error
    assert "but it changed: checksum" in error
    assert not (tmp_path / "run/hf").exists()


def test_a_checkpoint_with_other_frozen_weights_is_not_resumed(world, tmp_path, capsys):
    folder = world.fit(tmp_path / "run", *STAGE)
    last = (folder / "checkpoints/last.ckpt").resolve()
    state = torch.load(last, weights_only=True)
    name = next(name for name in state["state_dict"] if "vision_tower" in name)
    state["state_dict"][name].view(-1)[0] += 1
    torch.save(state, last)
    (folder / "hf/stage.json").unlink()
    options = ["--benchmark.at_stage_end=false", "--stage.lr_vision=null"]
    for steps in (3, 4):  # at the stage's end, where nothing is left to train; and before it
        assert world.run("fit", "--run_dir", folder, *options, f"--stage.max_steps={steps}") == 1
        assert f"does not train {name.removeprefix('model.')}, but it changed" in error_of(capsys)
        assert not (folder / "hf/stage.json").exists()


def test_frozen_towers_are_in_eval_mode_in_every_epoch(world, tmp_path):
    Watcher.modes.clear()
    options = [
        *STAGE[:1],
        "--stage.epochs=2",
        "--stage.max_steps=null",
        with_callback(world, tmp_path, Watcher),
    ]
    world.fit(tmp_path / "run", *options)
    assert {epoch for epoch, _ in Watcher.modes} == {0, 1}
    for _, found in Watcher.modes:
        assert found == {"vision_tower": {False}, "connector": {True}, "language_model": {True}}


def test_frozen_towers_are_in_eval_mode_where_a_run_goes_on_inside_an_epoch(world, tmp_path):
    options = [*STAGE, with_callback(world, tmp_path, Watcher)]
    folder = world.fit(tmp_path / "run", *options, "--stage.max_steps=2")
    (folder / "hf/stage.json").unlink()
    Watcher.modes.clear()
    world.fit(folder, *options)
    assert len(Watcher.modes) == 2, "one step of two micro batches"
    for _, found in Watcher.modes:
        assert found == {"vision_tower": {False}, "connector": {True}, "language_model": {True}}


def test_the_checksums_of_the_stages_start_stay_through_a_resume(world, tmp_path):
    folder = world.fit(tmp_path / "run", *STAGE)
    before = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["FrozenWeights"]
    assert len(before["checksums"]) > 5
    (folder / "hf/stage.json").unlink()
    world.fit(folder, *STAGE, "--stage.max_steps=4")
    assert (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["FrozenWeights"]
        == before
    )
