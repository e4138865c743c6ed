"""A recipe's stages are checked before the first one begins."""

import shutil
from collections import namedtuple

import yaml

from alignvlm_pl.training.module import AlignVLMModule


def write_recipe(world, folder, **changes):
    """Three stages, the last two with changes by key of the files."""
    stage = yaml.safe_load((world.root / "stage.yaml").read_text())
    for name, parent in (("a", None), ("b", "a"), ("c", "b")):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**stage, "name": name, "parent": parent, "max_steps": 1}))
    stages = [{"stage": f"{name}.yaml", "override": changes.get(name, {})} for name in "abc"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": stages}))
    return recipe


def options(world, recipe, run_dir):
    files = [f"--{group}={world.root / name}.yaml" for group, name in (("model", "model"), ("data", "data"))]
    return ["fit", *files, f"--trainer={world.root / 'cpu.yaml'}", f"--config={recipe}", f"--run_dir={run_dir}"]


def test_all_that_is_missing_is_said_before_the_first_step(world, tmp_path, capsys, monkeypatch):
    from alignvlm_pl.cli import main

    monkeypatch.setattr(AlignVLMModule, "training_step", lambda *_: pytest_fail())
    recipe = write_recipe(
        world,
        tmp_path,
        a={"stage.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"beta": 1}}},
        b={"stage.global_batch_size": 5},
        c={
            "data.init_args.benchmarks": {"held": str(world.root / "held"), "klc": str(tmp_path / "gone")},
            "data.init_args.val": {"other": str(tmp_path / "away")},
            "data.init_args.sources": ["nothing"],
            "stage.calibrate": {"target_entropy": 30.0},
        },
    )
    assert main(options(world, recipe, tmp_path / "run")) != 0
    error = capsys.readouterr().err
    assert "no stage was started, because of 6 problem(s):" in error
    assert f"\n- {tmp_path / 'run' / '2-b'}: stage.global_batch_size=5 is not a multiple" in error
    assert f"\n- {tmp_path / 'run' / '1-a'}: stage.optimizer: torch.optim.SGD: " in error
    assert f"\n- {tmp_path / 'run' / '3-c'}: data.init_args.sources: no sample of source 'nothing'" in error
    assert f"\n- {tmp_path / 'run' / '3-c'}: stage.calibrate.target_entropy=30 nats: weights over" in error
    for folder in ("gone", "away"):
        assert f"\n- {tmp_path / 'run' / '3-c'}: " in error
        assert str(tmp_path / folder) in error
    assert not (tmp_path / "run" / "1-a" / "config.yaml").exists()


def pytest_fail():
    raise AssertionError("a step was trained")


def test_the_disk_must_hold_all_exports(world, tmp_path, capsys, monkeypatch):
    from alignvlm_pl.cli import main

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    recipe = write_recipe(world, tmp_path)
    assert main(options(world, recipe, tmp_path / "run")) != 0
    error = capsys.readouterr().err
    assert "0.0 GB are free, the exports of 3 stages take" in error
