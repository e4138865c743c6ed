"""A recipe's stages are checked before the first one begins."""

import re
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


def test_what_follows_from_the_configuration_is_said_before_the_first_step(world, tmp_path, capsys, monkeypatch):
    from alignvlm_pl.cli import main

    monkeypatch.setattr(AlignVLMModule, "training_step", lambda *_: pytest_fail())
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/hold/loss"}}
    recipe = write_recipe(
        world,
        tmp_path,
        a={
            "trainer.callbacks": [{"class_path": "LearningRateMonitor"}],
            "trainer.logger": False,
            "stage.optimizer": {"class_path": "torch.optim.SparseAdam"},
        },
        b={
            "stage.parent": "zzz",
            "data.init_args.train": [],
            "stage.lora": {"llm": {"r": 2, "target_modules": ["nope"]}},
            "stage.optimizer": {"class_path": "torch.optim.LBFGS"},
            "model.init_args.attention": "nope",
            "model.init_args.spec.connector": {"type": "mlp"},
            "trainer.callbacks": [stopping],
        },
        c={"model.init_args.spec.chat_template": "chatmll", "model.init_args.spec.connector": {"type": "mlp"}},
    )
    assert main(options(world, recipe, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    for folder, message in (
        ("1-a", "LearningRateMonitor needs a logger"),
        ("1-a", "stage.optimizer: SparseAdam does not step"),
        ("2-b", "stage.parent='zzz', but the stage before it is 'a'"),
        ("2-b", "data.init_args.train holds no dataset"),
        ("2-b", "stage.lora.llm.target_modules"),
        ("2-b", "stage.optimizer: "),
        ("2-b", "model.attention='nope'"),
        ("2-b", "EarlyStopping: monitor='val/hold/loss'; did you mean 'val/held/loss'?"),
        ("3-c", "chatmll"),
    ):
        assert re.search(rf"\n- {tmp_path / 'run' / folder}: .*{re.escape(message)}", error), message


def test_stages_that_get_no_batch_or_lack_a_device_are_named(world, tmp_path, capsys, monkeypatch):
    from alignvlm_pl.cli import main
    from alignvlm_pl.ops import linear_cross_entropy

    monkeypatch.setattr(AlignVLMModule, "training_step", lambda *_: pytest_fail())
    monkeypatch.setattr(linear_cross_entropy, "_has_liger", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe = write_recipe(
        world,
        tmp_path,
        a={"trainer.limit_train_batches": 0.1},
        b={"trainer.limit_val_batches": 0.3, "model.init_args.loss_backend": "liger"},
        c={"trainer.val_check_interval": 9},
    )
    assert main(options(world, recipe, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "1-a: trainer.limit_train_batches=0.1 of 8 batches is none; give at least 0.125" in error
    assert "2-b: trainer.limit_val_batches=0.3 of 3 batches is none; give at least 0.333" in error
    assert "2-b: loss_backend 'liger' needs a CUDA device, the model is on cpu; use loss_backend: auto" in error
    assert "3-c: trainer.val_check_interval=9: an epoch has 8 batches" in error
    assert "4 problem(s)" in error


def test_a_stage_with_another_connector_than_the_one_before_it_is_refused(world, tmp_path, capsys, monkeypatch):
    from alignvlm_pl.cli import main

    monkeypatch.setattr(AlignVLMModule, "training_step", lambda *_: pytest_fail())
    recipe = write_recipe(world, tmp_path, c={"model.init_args.spec.connector": {"type": "mlp"}})
    assert main(options(world, recipe, tmp_path / "run")) == 1
    assert "3-c: stage 'b' was trained with connector.type align" in capsys.readouterr().err


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
