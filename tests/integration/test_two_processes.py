"""`fit`, `validate` and `test` on two real processes (gloo) through the command line, against one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.command import cli


def gradient_norms(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/gradient_norm")]


@pytest.mark.slow
def test_two_processes_train_and_score_like_one(world, tmp_path):
    """A step takes all 16 samples, as 2 x 8 or 1 x 16; five to score are uneven over two ranks, none counts twice."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    stage = ["--stage.max_steps=2", "--stage.global_batch_size=16", "--benchmark.subset=3"]
    output = cli("fit", *world.options(*two, *stage, "--run_dir", tmp_path / "two", "--data.init_args.batch_size=8"))
    assert output.count("stage all: 2 steps, weights in") == output.count("global batch 16") == 1
    assert "Total length" not in output
    assert "INFO" not in output
    single = world.fit(tmp_path / "single", *stage, "--data.init_args.batch_size=16")
    for name, value in load_file(single / "hf/model.safetensors").items():
        trained = load_file(tmp_path / "two/hf/model.safetensors")[name]
        # As in test_fit_tiny.py: Adam magnifies rounding where a gradient is all but zero; the lr is 1e-3.
        torch.testing.assert_close(trained, value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Adam ignores the scale of gradients, so their norm is compared as well.
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(single), rel=1e-4)
    state = load_file(tmp_path / "two/hf/model.safetensors")
    assert json.loads((tmp_path / "two/hf/stage.json").read_text())["steps"] == 2
    assert len((tmp_path / "two/predictions/held-step000002.jsonl").read_text().splitlines()) == 3
    checkpoint = tmp_path / "two/checkpoints/last.ckpt"
    saved = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in state.items())

    for command in ("validate", "test"):
        cli(command, *world.options(*two, "--run_dir", tmp_path / command, "--ckpt_path", checkpoint), ranks=2)
    assert world.run("test", "--run_dir", tmp_path / "one", "--ckpt_path", checkpoint) == 0
    one, validated, tested = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "validate", "test")
    )
    assert one["benchmarks"]["held"]["num"] == 5
    assert validated["benchmarks"] == tested["benchmarks"] == one["benchmarks"]
    assert tested["loss"]["held"] == pytest.approx(one["loss"]["held"], rel=1e-6)
    files = [tmp_path / name / "predictions/held.jsonl" for name in ("one", "test")]
    assert files[0].read_text() == files[1].read_text()
