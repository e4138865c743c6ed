"""Frozen towers stay in eval mode. That frozen weights keep their bytes is in test_fit_tiny.py."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

STAGE = ["--stage.lr_vision=null", "--stage.max_steps=3", "--checkpoint_every_n_steps=1"]


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
    path.write_text(yaml.safe_dump({**cpu, "callbacks": [{"class_path": f"{kind.__module__}.{kind.__name__}"}]}))
    return f"--trainer={path}"


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


def test_frozen_towers_are_in_eval_mode_where_a_run_resumes_inside_an_epoch(world, tmp_path):
    options = [*STAGE, with_callback(world, tmp_path, Watcher)]
    folder = world.fit(tmp_path / "run", *options, "--stage.max_steps=2")
    (folder / "hf/stage.json").unlink()
    Watcher.modes.clear()
    world.fit(folder, *options)
    assert len(Watcher.modes) == 2, "one step of two micro batches"
    for _, found in Watcher.modes:
        assert found == {"vision_tower": {False}, "connector": {True}, "language_model": {True}}
