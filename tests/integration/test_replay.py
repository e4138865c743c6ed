"""The ledger through kills, resumes and ranks; `replay` gives back the batch and, with its weights, its losses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignvlm_pl.cli import main
from tests.drills.launch import run_program
from tests.integration.command import cli

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from alignvlm_pl.training.module import AlignVLMModule
step = AlignVLMModule.training_step
def training_step(self, batch, index):
    if self.trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)
AlignVLMModule.training_step = training_step
from alignvlm_pl.cli import main
sys.exit(main(sys.argv[1:]))
"""


def ledger(folder: Path) -> list[dict[str, Any]]:
    """Lines of all ranks, without the heads."""
    paths = sorted((folder / "ledger").glob("*"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line for line in lines if "step" in line]


def replay(capsys: pytest.CaptureFixture, folder: Path, step: int, *options: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["replay", "--run", str(folder), "--step", str(step), "--json", *map(str, options)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def assert_recomputed(found: dict[str, Any]) -> None:
    """The losses are those of the run: the same batch, weights and arithmetic."""
    for micro in found["micro_batches"]:
        assert micro["recomputed"] == {name: micro[name] for name in micro["recomputed"]}
        assert set(micro["recomputed"]) == {"supervised", "losses", "loss", "sources"}
    assert found["recomputed"] == found["recorded"]
    assert found["weights_of_the_step"]


@pytest.fixture(scope="session")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of five steps."""
    return world.fit(tmp_path_factory.mktemp("whole") / "run", "--stage.max_steps=5")


def test_each_micro_batch_has_a_line(whole):
    lines = ledger(whole)
    assert [(line["step"], line["micro"], line["rank"]) for line in lines] == [
        (step, micro, 0) for step in range(1, 6) for micro in (0, 1)
    ]
    assert sorted(key for line in lines[:8] for key in line["keys"]) == [f"train-{n:08}" for n in range(16)]
    assert all(sum(line["supervised"]) == line["sources"]["made"][1] for line in lines)
    assert all(line["loss"] == pytest.approx(line["sources"]["made"][0], rel=1e-6) for line in lines)


def test_step_one_is_rebuilt_with_its_losses(whole, capsys):
    found = replay(capsys, whole, 1)
    assert_recomputed(found)
    assert [micro["keys"] for micro in found["micro_batches"]] == [line["keys"] for line in ledger(whole)[:2]]
    assert found["micro_batches"][0]["prompts"] == ["what?", "what?"]


def test_losses_of_other_weights_are_said_to_be_so(whole, capsys):
    found = replay(capsys, whole, 4)
    assert not found["weights_of_the_step"]
    assert "NOT those the step began with: step 4 began with those after step 3" in found["weights"]
    assert "last.ckpt (after step 5)" in found["weights"]
    assert found["recomputed"] != pytest.approx(found["recorded"], rel=1e-4)
    given = replay(capsys, whole, 4, "--weights", whole / "hf")
    assert given["recomputed"] == pytest.approx(found["recomputed"], rel=1e-6)
    assert "hf (after step 5)" in given["weights"]


def test_weights_beside_their_average_are_those_that_train(world, tmp_path, capsys):
    options = ["--stage.max_steps=3", "--stage.ema_decay=0.9"]
    every = ["--checkpoint_every_n_steps=1", "--checkpoint_keep_last=3"]
    folder = world.fit(tmp_path / "run", *options, *every)
    for step in (2, 3):
        found = replay(capsys, folder, step)
        assert f"step{step - 1:08d}.ckpt" in found["weights"]
        assert_recomputed(found)
    output = replay(capsys, folder, 3, "--weights", folder / "hf")
    assert "the folder holds the average of stage.ema_decay" in output["weights"]


def test_the_table_shows_every_sample(whole, capsys):
    assert main(["replay", "--run", str(whole), "--step", "2", "--samples_only"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("step 2 of stage all: 4 samples in 2 micro batches of 1 ranks\n")
    for key in [key for line in ledger(whole)[2:4] for key in line["keys"]]:
        assert output.count(key) == 1
    assert "recomputed " not in output.split("prompt", 1)[1]


@pytest.mark.slow
def test_a_killed_run_that_resumes_has_each_step_once_and_the_same(world, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    options = world.options("--benchmark.at_stage_end=false", "--stage.max_steps=5", "--run_dir", folder)
    options.append("--checkpoint_every_n_steps=2")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with pytest.raises(AssertionError, match="-9"):
        run_program(script, "fit", *options)
    # The checkpoint is of step 2: step 3 is trained once more.
    assert [line["step"] for line in ledger(folder)] == [1, 1, 2, 2, 3, 3]
    shutil.copy(folder / "checkpoints/last.ckpt", tmp_path / "after2.ckpt")
    assert_recomputed(replay(capsys, folder, 3))
    assert main(["fit", *options]) == 0
    assert ledger(folder) == ledger(whole)
    assert_recomputed(replay(capsys, folder, 3, "--weights", tmp_path / "after2.ckpt"))


@pytest.mark.slow
def test_batches_of_two_ranks_are_rebuilt_on_one_process(world, tmp_path, capsys):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--stage.global_batch_size=8"]
    options = world.options(*two, "--benchmark.at_stage_end=false", "--stage.max_steps=2", "--run_dir", tmp_path)
    cli("fit", *options, ranks=2)
    found = replay(capsys, tmp_path, 1)
    assert_recomputed(found)
    assert [(m["rank"], m["micro"]) for m in found["micro_batches"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # Resuming alone cuts the second rank's file as well.
    (tmp_path / "checkpoints/last.ckpt").unlink()
    shutil.rmtree(tmp_path / "hf")
    world.fit(tmp_path, "--stage.max_steps=1")
    assert {(line["step"], line["rank"]) for line in ledger(tmp_path)} == {(1, 0)}


@pytest.mark.parametrize(
    "options",
    [
        ["--data.init_args.token_budget=160", "--data.init_args.pack_window=8"],
        ["--stage.objective=read", "--stage.lr_llm=null", "--stage.lr_vision=null"],
        ["--stage.objective=patch", "--stage.lr_llm=null", "--stage.lr_vision=null"],
        ["--stage.readout_weight=0.5", "--stage.calibrate={target_entropy: 3.0}"],
    ],
    ids=["packed", "read", "patch", "calibrated"],
)
def test_other_batches_and_objectives_are_rebuilt(world, tmp_path, capsys, options):
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", *options)
    assert_recomputed(replay(capsys, folder, 1))


def test_a_run_with_kernels_of_a_gpu_is_rebuilt_on_a_cpu(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["spec"]["connector"]["backend"] = "triton"
    config["model"]["init_args"] |= {"loss_backend": "liger", "compile": ["llm"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "ledger/rank00000.jsonl"
    path.write_text(path.read_text().replace('"device":"cpu"', '"device":"cuda"'))
    found = replay(capsys, folder, 1)
    assert "random initial weights were drawn on cuda" in found["weights"]
    assert found["recomputed"] == pytest.approx(found["recorded"], rel=1e-6)


def test_what_a_sharded_run_drew_is_not_drawn_again(world, tmp_path, capsys):
    trainer = yaml.safe_load((world.root / "cpu.yaml").read_text())
    trainer["strategy"] = {"class_path": "alignvlm_pl.strategies.fsdp.ShardedStrategy"}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({**trainer, "devices": 2}))
    options = world.options(
        f"--trainer={tmp_path / 'trainer.yaml'}", "--benchmark.at_stage_end=false", "--stage.max_steps=1"
    )
    cli("fit", *options, "--run_dir", tmp_path / "run", ranks=2)
    found = replay(capsys, tmp_path / "run", 1)
    assert not found["weights_of_the_step"]
    assert "drawn in another order under alignvlm_pl.strategies.fsdp.ShardedStrategy" in found["weights"]
    assert found["recomputed"] != found["recorded"]


def error(capsys: pytest.CaptureFixture, *options: Any) -> str:
    capsys.readouterr()
    assert main(["replay", *map(str, options)]) == 1
    output = capsys.readouterr().err
    assert "Traceback" not in output
    return output


def test_invalid_input_is_named(whole, tmp_path, capsys):
    assert "there is no config.yaml" in error(capsys, "--run", tmp_path, "--step", 1)
    assert f"it has the stages {whole.name}" in error(capsys, "--run", whole.parent, "--step", 1)
    assert "there is no step 6; it has steps 1 to 5" in error(capsys, "--run", whole, "--step", 6)
    assert "--step 0: steps count from 1" in error(capsys, "--run", whole, "--step", 0)
    missing = ["--weights", tmp_path / "no.ckpt"]
    assert "no.ckpt: there is no such file" in error(capsys, "--run", whole, "--step", 1, *missing)
    (tmp_path / "bad.ckpt").write_text("no")
    bad = ["--weights", tmp_path / "bad.ckpt"]
    assert "bad.ckpt is damaged or no checkpoint" in error(capsys, "--run", whole, "--step", 1, *bad)


def test_changed_data_and_settings_are_refused(world, tmp_path, capsys):
    shutil.copytree(world.root / "train", tmp_path / "set")
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", f"--data.init_args.train=[{tmp_path / 'set'}]")
    path = next(iter((tmp_path / "set").glob("*2.tar")))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"what?", b"when?"))
    output = error(capsys, "--run", folder, "--step", 1)
    assert "is damaged: expected sha256" in output
    path.write_bytes(content)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("batch_size: 2\n", "batch_size: 1\n"))
    output = error(capsys, "--run", folder, "--step", 1)
    assert "trained on other data or settings: batch_size was 2, is 1" in output
    manifest = tmp_path / "set/manifest.json"
    manifest.write_text(manifest.read_text().replace('"license": "CC0-1.0"', '"license": "other"'))
    (folder / "config.yaml").write_text(config)
    assert "sets of train was" in error(capsys, "--run", folder, "--step", 1)
