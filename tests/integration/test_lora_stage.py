"""Stages that train adapters, through the command line: frozen base, merged folder, export, resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
LORA = {"llm": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}}
ADAPTED = ("q_proj", "v_proj", "down_proj")


def stage(world: Any, path: Path, **values: Any) -> Path:
    content = yaml.safe_load((world.root / "stage.yaml").read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "lora": LORA, "lr_vision": None, "lr_llm": 1e-2, **values}))
    return path


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="session")
def recipe_run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a stage that trains everything and one that trains connector and adapter."""
    from alignvlm_pl.cli import main

    root = tmp_path_factory.mktemp("lora")
    stage(world, root / "whole.yaml", name="whole", lora=None, lr_llm=1e-3)
    stage(world, root / "adapter.yaml", name="adapter", parent="whole")
    stage(world, root / "after.yaml", name="after", parent="adapter", lora=None, lr_llm=1e-12, lr_connector=None)
    recipe = {"model": str(world.root / "model.yaml"), "data": str(world.root / "data.yaml")}
    recipe |= {"trainer": str(world.root / "cpu.yaml"), "benchmark": {"at_stage_end": False}}
    recipe |= {"stages": [{"stage": f"{name}.yaml"} for name in ("whole", "adapter", "after")]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(root / "recipe.yaml"), "--run_dir", str(root / "run")]) == 0
    return root / "run"


def test_the_base_is_bit_identical_and_the_exported_weights_are_merged(recipe_run):
    before = load_file(recipe_run / "1-whole/hf/model.safetensors")
    trained = checkpoint(recipe_run / "2-adapter")["state_dict"]
    merged = load_file(recipe_run / "2-adapter/hf/model.safetensors")
    assert merged.keys() == before.keys()
    for name, value in before.items():
        if name.startswith("connector."):
            continue
        kept = trained["model." + (name.replace(".weight", ".base_layer.weight") if is_adapted(name) else name)]
        assert torch.equal(kept, value), name
        assert torch.equal(merged[name], value) == (not is_adapted(name)), name
        if is_adapted(name):
            stem = "model." + name.removesuffix(".weight")
            a, b = (trained[f"{stem}.lora_{factor}.default.weight"] for factor in "AB")
            torch.testing.assert_close(merged[name], value + 8 / 4 * b @ a, rtol=0, atol=1e-7)


def is_adapted(name: str) -> bool:
    return name.startswith("language_model.") and name.split(".")[-2] in ADAPTED


def test_the_adapter_lies_beside_the_merged_model_in_pefts_layout(recipe_run):
    folder = recipe_run / "2-adapter/hf/adapter/llm"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 3 * 2
    assert not (recipe_run / "2-adapter/hf/adapter_config.json").exists()


def test_the_next_stage_starts_from_the_merged_weights(recipe_run):
    merged, after = (load_file(recipe_run / f"{name}/hf/model.safetensors") for name in ("2-adapter", "3-after"))
    # A learning rate of all but zero.
    assert all(torch.allclose(value, after[name], rtol=0, atol=1e-7) for name, value in merged.items())


def test_params_counts_the_adapters_of_each_stage_alone(recipe_run):
    from alignvlm_pl.cli.params import tables

    whole, adapter, after = tables(recipe_run.parent / "recipe.yaml")
    # Two layers of q 64x64, v 32x64 and down 64x128, four rows and columns of each.
    added = 2 * 4 * ((64 + 64) + (32 + 64) + (64 + 128))
    assert f"llm (LoRA r=4)      93,952      {added:,}" in adapter
    assert "LoRA" not in whole + after
    assert f"{93952 - added:,}" in after


def test_a_checkpoint_with_adapters_is_scored_as_the_merged_folder_is(recipe_run, tmp_path):
    from alignvlm_pl.cli import main

    run = recipe_run / "2-adapter"
    sources = {
        "adapter": f"--ckpt_path={run / 'checkpoints/last.ckpt'}",
        "merged": f"--model.weights={run / 'hf'}",
        "parent": f"--model.weights={recipe_run / '1-whole/hf'}",
    }
    losses = {}
    for name, source in sources.items():
        folder = tmp_path / name
        assert main(["test", "--config", str(run / "config.yaml"), source, "--run_dir", str(folder)]) == 0
        losses[name] = json.loads((folder / "results.json").read_text())["loss"]["held"]
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-6)
    assert abs(losses["parent"] - losses["merged"]) > 1e-3


def test_an_interrupted_adapter_resumes_bit_for_bit(world, tmp_path):
    steady = {"llm": {**LORA["llm"], "dropout": 0.0}}
    file = stage(world, tmp_path / "stage.yaml", max_steps=4, lora=steady)
    options = [f"--stage={file}", "--checkpoint_every_n_steps=1"]
    whole = world.fit(tmp_path / "whole", *options)
    world.fit(world.cut(tmp_path / "cut", *options), *options)
    first, second = (checkpoint(folder)["state_dict"] for folder in (whole, tmp_path / "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_checkpoint_of_another_adapter_is_refused(world, recipe_run, tmp_path, capsys):
    file = stage(world, tmp_path / "stage.yaml", name="adapter", lora={"llm": {**LORA["llm"], "alpha": 9}})
    options = ["--stage", file, "--ckpt_path", recipe_run / "2-adapter/checkpoints/last.ckpt"]
    assert world.run("fit", *options, "--run_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "the checkpoint was trained with stage.lora={'llm': {'r': 4, 'alpha': 8," in error
    assert "now {'llm': {'r': 4, 'alpha': 9," in error


def test_an_adapter_under_a_sharding_strategy_is_refused(world, tmp_path, capsys):
    file = stage(world, tmp_path / "stage.yaml")
    options = [
        "--stage",
        file,
        "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
    ]
    assert world.run("fit", *options, "--run_dir", tmp_path / "run") == 1
    expected = "stage.lora.llm needs all parameters on each rank, trainer.strategy is ModelParallelStrategy"
    assert expected in capsys.readouterr().err


def test_a_four_bit_base_trains_resumes_and_merges(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    from alignvlm_pl.cli import main

    monkeypatch.setattr("alignvlm_pl.training.lora._check_4bit", lambda part: None)  # its own CPU code will do here
    settings = {"llm": {"r": 4, "load_in_4bit": True}}
    options = [
        f"--stage={stage(world, tmp_path / 'stage.yaml', lora=settings)}",
        "--checkpoint_every_n_steps=1",
    ]
    whole = world.fit(tmp_path / "whole", *options)
    world.fit(world.cut(tmp_path / "cut", *options), *options)
    first, second = (load_file(folder / "hf/model.safetensors") for folder in (whole, tmp_path / "cut"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any("base_layer.weight" in name for name in checkpoint(whole)["state_dict"])
    losses = {}
    for name, source in {
        "adapter": f"--ckpt_path={whole / 'checkpoints/last.ckpt'}",
        "merged": f"--model.weights={whole / 'hf'}",
    }.items():
        assert world.run("test", source, "--run_dir", tmp_path / name) == 0
        losses[name] = json.loads((tmp_path / name / "results.json").read_text())["loss"]["held"]
    # The 4-bit layers compute in bfloat16.
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-2)
    assert main(["export", str(whole), str(tmp_path / "again")]) == 1
    assert "does not hold the 4-bit base of llm, whose weights were random" in capsys.readouterr().err
