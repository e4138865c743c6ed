"""A whole tiny world in a folder: shards, a random model and the configs to train it through the real command line."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from datamodules.shards.writer import ShardWriter

GROUPS = {"model": "model", "data": "data", "stage": "stage", "trainer": "cpu"}


class World:
    """A folder with `model.yaml`, `data.yaml`, `stage.yaml`, `cpu.yaml` and the sets `train` (16) and `held` (5)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def options(self, *options: Any) -> list[str]:
        """Options of a command on this world; later ones win."""
        files = [f"--{group}={self.root / name}.yaml" for group, name in GROUPS.items()]
        return [*files, "--benchmark.max_new_tokens=4", *map(str, options)]

    def run(self, command: str, *options: Any) -> int:
        """Run a command in this process."""
        from alignvlm_pl.cli import main

        return main([command, *self.options(*options)])

    def fit(self, folder: Path, *options: Any) -> Path:
        """Train to the end without benchmarks; returns the run folder."""
        assert self.run("fit", "--run_dir", folder, "--benchmark.at_stage_end=false", *options) == 0
        return folder

    def cut(self, folder: Path, *options: Any, step: int = 2) -> Path:
        """As `fit`, but an error ends the run after that many optimizer steps."""
        from alignvlm_pl.training.module import AlignVLMModule

        training_step = AlignVLMModule.training_step

        def failing(module: Any, batch: Any, batch_idx: int) -> Any:
            if module.trainer.global_step == step:
                raise RuntimeError("power cut")
            return training_step(module, batch, batch_idx)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AlignVLMModule, "training_step", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                self.fit(folder, *options)
        return folder


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def write_set(folder: Path, count: int, *, samples_per_shard: int) -> None:
    """Pictures of a number, of one or two tiles, with answers of unequal lengths."""
    with ShardWriter(
        folder, name=folder.name, source="made", license="CC0-1.0", samples_per_shard=samples_per_shard
    ) as out:
        for index in range(count):
            text = f"{index % 5}{3 * index % 7}"
            picture, buffer = Image.new("RGB", (56, 56) if index % 3 else (112, 56), "white"), io.BytesIO()
            ImageDraw.Draw(picture).text((4, 4), text, fill="black")
            picture.save(buffer, "PNG")
            asked = [{"type": "image", "index": 0}, {"type": "text", "text": "what?"}]
            answer = [{"type": "text", "text": text * (1 + index % 2)}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            lines = [{"text": text, "box": [4, 4, 20, 16]}]
            out.add({"messages": messages, "lines": lines}, [buffer.getvalue()], ["png"])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world; a random SigLIP of 16 tokens a tile, ALIGN and a random Llama."""
    from alignvlm_pl.models.tiny import tiny_spec

    root = tmp_path_factory.mktemp("world")
    write_set(root / "train", 16, samples_per_shard=4)
    write_set(root / "held", 5, samples_per_shard=3)
    held = {"held": str(root / "held")}
    settings = {"batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "shuffle_buffer": 0}
    data = {"train": [str(root / "train")], "val": held, "benchmarks": held, **settings}
    rates = {"lr_vision": 1e-3, "lr_connector": 1e-3, "lr_llm": 1e-3}
    cpu = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    write_yaml(root / "model.yaml", {"spec": dataclasses.asdict(tiny_spec(root / "tokenizer"))})
    write_yaml(root / "data.yaml", {"class_path": "DocDownstreamDataModule", "init_args": data})
    write_yaml(root / "stage.yaml", {"name": "all", **rates, "global_batch_size": 4, "max_steps": 3})
    write_yaml(root / "cpu.yaml", {**cpu, "log_every_n_steps": 1})
    return World(root)


@pytest.fixture(scope="session")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two steps; to be copied before it is changed."""
    return world.fit(tmp_path_factory.mktemp("trained") / "run", "--stage.max_steps=2")


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the batches that are validated in this process, as they come."""
    from alignvlm_pl.training.module import AlignVLMModule

    seen: list[int] = []
    step = AlignVLMModule.validation_step

    def counted(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        seen.append(batch_idx)
        return step(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(AlignVLMModule, "validation_step", counted)
    return seen


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command line sets for its own process must not outlive a test."""
    import logging

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers
