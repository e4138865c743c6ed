"""`stage.ema_decay` through the command line: the average by hand, what is evaluated, exported, kept and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.command import cli

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DECAY = 0.9
OPTIONS = ["--stage.max_steps=4", f"--stage.ema_decay={DECAY}", "--stage.lr_vision=null"]
# One micro batch a step: with more, the next one would compensate an update that came after the checkpoint.
OPTIONS += ["--checkpoint_every_n_steps=1", "--data.init_args.batch_size=4"]


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"model.{name}": value for name, value in load_file(folder / "hf/model.safetensors").items()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The trained weights after each optimizer step."""
    from alignvlm_pl.training.module import AlignVLMModule
    from callbacks import DataHealth

    found: list[dict[str, torch.Tensor]] = []
    end = DataHealth.on_train_batch_end

    def record(self, trainer, pl_module: AlignVLMModule, *rest: Any) -> None:
        if trainer.global_step > len(found):
            found.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        end(self, trainer, pl_module, *rest)

    monkeypatch.setattr(DataHealth, "on_train_batch_end", record)
    return found


@pytest.mark.parametrize("every", [1, 500], ids=["saved-in-step", "saved-at-the-end"])
def test_the_average_is_that_of_the_formula_and_both_states_are_kept(world, tmp_path, recorded, every):
    folder = world.fit(tmp_path / "run", *OPTIONS, f"--checkpoint_every_n_steps={every}")
    assert len(recorded) == 4
    average = dict(recorded[0])
    for state in recorded[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in state.items()}
    left, exported = checkpoint(folder), weights(folder)
    for name, value in exported.items():
        frozen = name.startswith("model.vision_tower.")
        assert torch.equal(value, recorded[0][name]) == frozen, name
        # float32, an interpolation in place of two products. Measured: 4e-7 of weights up to 1.
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-6, msg=name)
        assert torch.equal(left["state_dict"][name], value)
        assert torch.equal(left["current_model_state"][name], recorded[-1][name])
    assert left["averaging_state"] == {"n_averaged": torch.tensor(4)}


def test_frozen_weights_are_bit_identical(world, tmp_path, recorded):
    folder = world.fit(tmp_path / "run", *OPTIONS)
    frozen = [name for name in recorded[0] if name.startswith("model.vision_tower.")]
    assert len(frozen) > 10
    assert all(torch.equal(weights(folder)[name], recorded[0][name]) for name in frozen)


@pytest.mark.parametrize("cut", [1, 2])
def test_an_interrupted_average_resumes_bit_for_bit(world, tmp_path, monkeypatch, cut):
    from alignvlm_pl.training.module import AlignVLMModule

    whole = world.fit(tmp_path / "whole", *OPTIONS)
    step = AlignVLMModule.training_step

    def failing(self, batch, batch_idx):
        if self.trainer.global_step == cut:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AlignVLMModule, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        world.fit(tmp_path / "cut", *OPTIONS)
    monkeypatch.setattr(AlignVLMModule, "training_step", step)
    world.fit(tmp_path / "cut", *OPTIONS)
    first, second = checkpoint(whole), checkpoint(tmp_path / "cut")
    for key in ("state_dict", "current_model_state"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items()), key
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path / "cut").items())


def test_a_stage_cut_off_before_its_export_exports_the_average(world, tmp_path):
    import shutil

    folder = world.fit(tmp_path / "run", *OPTIONS)
    before = weights(folder)
    shutil.rmtree(folder / "hf")
    world.fit(folder, *OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())


def test_validation_and_benchmarks_see_the_average_and_training_continues_with_the_weights(
    world, tmp_path, monkeypatch
):
    from alignvlm_pl.training.module import AlignVLMModule

    seen: list[tuple[str, int, torch.Tensor]] = []
    name = "model.language_model.model.norm.weight"

    def note(kind: str, module: AlignVLMModule) -> None:
        seen.append((kind, module.trainer.global_step, module.state_dict()[name].clone()))

    generate, validate, step = (
        AlignVLMModule.generate,
        AlignVLMModule.validation_step,
        AlignVLMModule.training_step,
    )
    monkeypatch.setattr(AlignVLMModule, "generate", lambda self, *b, **k: note("a", self) or generate(self, *b, **k))
    monkeypatch.setattr(AlignVLMModule, "validation_step", lambda self, *b: note("v", self) or validate(self, *b))
    monkeypatch.setattr(AlignVLMModule, "training_step", lambda self, *b: note("t", self) or step(self, *b))
    when = ["--benchmark.every_n_steps=2", "--trainer.limit_val_batches=1"]
    run = tmp_path / "run"
    assert world.run("fit", "--run_dir", run, *OPTIONS, *when, "--benchmark.at_stage_end=true") == 0
    plain = world.fit(tmp_path / "plain", *OPTIONS)
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(run).items())
    training = {step: value for kind, step, value in seen if kind == "t"}
    looks = [(kind, step) for kind, step, _ in seen if kind != "t"]
    assert {("a", 2), ("v", 2), ("a", 4), ("v", 4)} <= set(looks)
    average = DECAY * training[1] + (1 - DECAY) * training[2]
    for kind, step, value in seen:
        if kind != "t" and step == 2:
            torch.testing.assert_close(value, average, rtol=0, atol=1e-6)
            assert not torch.allclose(value, training[2], rtol=0, atol=1e-5)


def test_a_checkpoint_is_scored_by_its_average(world, tmp_path):
    from alignvlm_pl.cli import main

    run = world.fit(tmp_path / "run", *OPTIONS)
    losses = []
    for name, source in {
        "a": f"--ckpt_path={run / 'checkpoints/last.ckpt'}",
        "b": f"--model.weights={run / 'hf'}",
    }.items():
        assert main(["test", "--config", str(run / "config.yaml"), source, "--run_dir", str(tmp_path / name)]) == 0
        losses.append(json.loads((tmp_path / name / "results.json").read_text())["loss"]["held"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("first", "second"), [("null", "0.75"), ("0.75", "null"), ("0.75", "0.5")], ids=["new", "gone", "other"]
)
def test_a_resumed_stage_must_keep_its_average(world, tmp_path, capsys, first, second):
    steps = ["--stage.max_steps=2", "--stage.lr_vision=null"]
    run = world.fit(tmp_path / "run", *steps, f"--stage.ema_decay={first}")
    again = [*steps, f"--stage.ema_decay={second}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    assert world.run("fit", *again, "--run_dir", tmp_path / "again") == 1
    as_python = {"null": "None"}
    expected = f"the checkpoint was trained with stage.ema_decay={as_python.get(first, first)}, now "
    assert expected + as_python.get(second, second) in capsys.readouterr().err


def test_two_ranks_average_an_adapter_as_one_does(world, tmp_path):
    pytest.importorskip("peft")
    lora = '--stage.lora={"llm": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}'
    options = ["--stage.max_steps=3", "--stage.global_batch_size=16", lora, "--stage.ema_decay=0.5"]
    options += ["--stage.lr_llm=1e-2", "--benchmark.at_stage_end=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=8"]
    cli("fit", *world.options(*options, *two), "--run_dir", tmp_path / "two", ranks=2)
    one = world.fit(tmp_path / "one", *options, "--data.init_args.batch_size=16")
    start = world.fit(tmp_path / "start", "--stage.max_steps=1", "--stage.lr_llm=1e-12")
    name = "model.language_model.model.layers.0.self_attn.q_proj.weight"
    assert (weights(one)[name] - weights(start)[name]).abs().max() > 1e-3
    for name, value in weights(one).items():
        # As in test_fit_tiny.py, at up to 10 times its learning rate. Measured: 1e-6.
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused(name):
    from types import SimpleNamespace

    from lightning.pytorch import strategies

    from alignvlm_pl.errors import ConfigError
    from callbacks.averaged_weights import AveragedWeights

    kind = getattr(strategies, name)
    trainer: Any = SimpleNamespace(strategy=kind.__new__(kind))  # deepspeed need not be installed
    message = rf"stage.ema_decay=0.9 needs all parameters on each rank, trainer.strategy is {name}; use .* ddp"
    with pytest.raises(ConfigError, match=message):
        AveragedWeights(0.9).setup(trainer, pl_module=None, stage="fit")


def test_a_decay_is_a_share(world, tmp_path, capsys):
    assert world.run("fit", "--stage.ema_decay=1.5", "--run_dir", tmp_path / "run") == 1
    assert "stage.ema_decay=1.5: expected a share in (0, 1), or null" in capsys.readouterr().err


def test_four_bit_weights_are_not_averaged(world, tmp_path, capsys):
    lora = '--stage.lora={"llm": {"load_in_4bit": true}}'
    assert world.run("fit", lora, "--stage.ema_decay=0.9", "--run_dir", tmp_path / "run") == 1
    assert "cannot average the 4-bit weights of stage.lora.llm.load_in_4bit" in capsys.readouterr().err
