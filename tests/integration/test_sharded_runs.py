"""FSDP2 on two real processes (gloo) through the command line: stage end, a kill between two renames, evaluation."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignvlm_pl.cli import main
from alignvlm_pl.cli.describe import describe
from tests.integration.command import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sharded(world, tmp_path_factory):
    """Options that shard the model over two ranks, from the shipped cluster file."""
    shipped = yaml.safe_load((ROOT / "configs/cluster/fsdp.yaml").read_text())
    file = tmp_path_factory.mktemp("cluster") / "fsdp.yaml"
    settings = {"accelerator": "cpu", "devices": 2, "num_sanity_val_steps": 0}
    file.write_text(yaml.safe_dump({**shipped, **settings, "precision": "32-true", "log_every_n_steps": 1}))
    return ["--trainer", file]


@pytest.mark.slow
def test_a_sharded_run_ends_is_resumed_and_evaluated(world, sharded, tmp_path, capsys):
    run, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    health = ["--stage.calibrate.target_entropy=3.0", "--connector_health.every_n_steps=1"]
    stage = ["--stage.max_steps=2", "--stage.global_batch_size=16", "--checkpoint_every_n_steps=1"]
    stage += ["--checkpoint_keep_last=2"]
    fit = ["fit", *world.options(*sharded, *health, *stage, "--benchmark.subset=3", "--run_dir", run)]
    output = cli(*fit, ranks=2)
    assert output.count("stage all: 2 steps, weights in") == output.count("calibrated:") == 1
    # Every rank's rows and nothing half written.
    assert sorted(path.name for path in last.iterdir()) == [
        "rank-00000-of-00002.ckpt",
        "rank-00001-of-00002.ckpt",
        "rest.ckpt",
    ]
    assert sorted(path.name for path in last.parent.iterdir()) == [
        "last.ckpt",
        "step00000001.ckpt",
        "step00000002.ckpt",
    ]
    assert (describe(last)["step"], describe(last)["stage"]["name"]) == (2, "all")
    weights, record = load_file(run / "hf/model.safetensors"), (run / "hf/stage.json").read_text()

    # One process computes the losses of both ranks' batches, with the weights that the step began with.
    capsys.readouterr()
    assert main(["replay", "--run", str(run), "--step", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights_of_the_step"] and "step00000001.ckpt" in found["weights"]
    assert found["recomputed"] == pytest.approx(found["recorded"], rel=1e-5)

    # Killed after the last checkpoint, before the stage's end was written.
    (run / "hf").rename(tmp_path / "first")
    assert "calibrated:" not in cli(*fit, ranks=2)
    found = json.loads((run / "hf/stage.json").read_text())
    assert found["steps"] == 2
    assert found["weights_sha256"] == json.loads(record)["weights_sha256"]

    assert world.run("test", "--run_dir", tmp_path / "one", "--ckpt_path", last) == 0
    cli("test", *world.options(*sharded, "--run_dir", tmp_path / "two", "--model.weights", run / "hf"), ranks=2)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["benchmarks"] == two["benchmarks"]
    assert one["benchmarks"]["held"]["num"] == 5
    assert two["loss"]["held"] == pytest.approx(one["loss"]["held"], rel=1e-6)

    # The folder is what `save_pretrained` would have written.
    from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration

    model = AlignVLMForConditionalGeneration.from_pretrained(run / "hf")
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "hf" / name).read_bytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", run / "hf")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0]["dtype"] == configs[1]["dtype"]
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("strategy", ["fsdp", "lightning.pytorch.strategies.ModelParallelStrategy"])
def test_other_shardings_are_refused(world, tmp_path, strategy, capsys):
    file = tmp_path / "cluster.yaml"
    value = {"class_path": strategy} if "." in strategy else strategy
    file.write_text(yaml.safe_dump({"accelerator": "cpu", "devices": 1, "strategy": value}))
    assert world.run("fit", "--trainer", file, "--run_dir", tmp_path / "run") == 1
    assert "error: trainer" in capsys.readouterr().err
