"""ZeRO-2 and -3 through the command line, two CPU processes: stages in a chain, kills, signals, evaluation."""

import json
import signal

import pytest
import yaml

from alignvlm_pl.cli.describe import describe
from tests.integration.command import ROOT, cli
from tests.integration.test_preemption import LOOKS, VALIDATED, stopped
from tests.integration.test_stage_kills import ledgers, records, run, write_recipe
from tests.integration.zero_on_cpu import deepspeed_on_path, needs_deepspeed

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(580)]
STRATEGIES = {
    stage: f"tests.integration.zero_on_cpu.Zero{'3' if stage == 3 else ''}OnCPU" for stage in (2, 3)
}


@pytest.fixture(autouse=True)
def _deepspeed():
    with deepspeed_on_path():
        yield


# A minute each: kills under ZeRO-3, whose checkpoints hold shares of all, and signals under ZeRO-2.
@pytest.mark.parametrize("stage", [3])
def test_stages_killed_in_the_second_end_as_unbroken_ones_and_are_evaluated(world, tmp_path, stage):
    recipe = write_recipe(world, tmp_path, 2)
    machine = yaml.safe_load((tmp_path / "cpu.yaml").read_text())
    machine["strategy"] = {"class_path": STRATEGIES[stage]}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(machine))
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"subset": 3}))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(recipe, whole) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    assert run(recipe, broken, kill_at="two:unlinked") == -signal.SIGKILL
    assert run(recipe, broken) == 0, (tmp_path / "broken.log").read_text()[-3000:]
    assert ledgers(broken) == ledgers(whole)
    assert records(broken) == records(whole)  # the hash of the weights too

    last = whole / "3-three/checkpoints/last.ckpt"
    told = describe(last)
    assert (told["step"], told["stage"]["name"], told["parent"]["stage"]) == (3, "three", "two")
    assert told["samples_seen"] == {"made": 12}
    assert sorted(path.name for path in last.iterdir()) == [
        "rank-00000-of-00002.ckpt",
        "rank-00001-of-00002.ckpt",
        "rest.ckpt",
    ]
    del machine["callbacks"]
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(machine))
    model = ["--model", tmp_path / "model.yaml"]
    for name, weights in (
        ("state", ["--ckpt_path", last]),
        ("hf", ["--model.weights", last.parents[1] / "hf"]),
    ):
        options = [*model, "--trainer", tmp_path / "zero.yaml", "--run_dir", tmp_path / name, *weights]
        cli("test", *world.options(*options))
    assert world.run("test", *model, "--run_dir", tmp_path / "one", "--ckpt_path", last) == 0
    found = {
        name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "state", "hf")
    }
    for name in ("state", "hf"):
        assert found[name]["benchmarks"] == found["one"]["benchmarks"]
        assert found[name]["loss"]["held"] == pytest.approx(found["one"]["loss"]["held"], rel=1e-6)


@pytest.mark.parametrize("stage", [2])
def test_two_stages_are_stopped_by_signals_wherever_they_come(tmp_path, stage):
    places = [
        {"place": "step", "stage": "1-first", "step": 0, "rank": 1},
        {"place": "validation", "stage": "1-first", "step": 2},
        {"place": "step", "stage": "2-second", "step": 1, "rank": 1, "signals": ["SIGTERM"]},
    ]
    options = [*VALIDATED, "--trainer.val_check_interval=2", *LOOKS]
    told = stopped(tmp_path, places, options, world=2, stages=2, strategy=STRATEGIES[stage])
    assert told == [f"left after step {step}" for step in (1, 2, 2)]


@pytest.mark.parametrize("stage", STRATEGIES)
def test_adapters_and_averages_are_refused(world, tmp_path, stage):
    shipped = yaml.safe_load((ROOT / f"configs/cluster/zero{stage}.yaml").read_text())
    settings = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    strategy = {
        "class_path": "tests.integration.zero_on_cpu.ZeroOnCPU",
        "init_args": shipped["strategy"]["init_args"],
    }
    file = tmp_path / "zero.yaml"
    file.write_text(yaml.safe_dump({**shipped, **settings, "strategy": strategy}))
    for setting in ("ema_decay=0.5", 'lora={"llm": {"r": 2}}'):
        with pytest.raises(AssertionError) as refused:
            cli("fit", *world.options("--trainer", file, f"--stage.{setting}", "--run_dir", tmp_path / "run"))
        assert (
            "needs all parameters on each rank, trainer.strategy is ZeroOnCPU; use trainer.strategy: ddp"
            in str(refused.value)
        )
