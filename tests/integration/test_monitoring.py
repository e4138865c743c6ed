"""What is measured while training: rates, work, memory, norms and rates by part, in TensorBoard and in the bar."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.training.flops import Work
from alignvlm_pl.training.optim import gradient_norms
from callbacks.progress import latest, shown
from callbacks.throughput import Throughput, peak_memory
from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]
RANK = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from alignvlm_pl.training.optim import gradient_norms

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
values = [torch.randn(5, 3), torch.randn(1), torch.randn(4, 2), torch.randn(7)]
placements = [Shard(0), Shard(0), Replicate(), None]  # one has rows on the first rank alone
parameters = []
for value, placement in zip(values, placements):
    tensor = value if placement is None else distribute_tensor(value, mesh, [placement])
    parameters.append(nn.Parameter(torch.zeros_like(tensor)))
    parameters[-1].grad = tensor
groups = [{"name": "llm/decay", "params": parameters[:2]}, {"name": "llm/no_decay", "params": parameters[2:]}]
norms = gradient_norms([*groups, {"name": "vision/decay", "params": parameters[1:2]}])
expected = torch.cat([value.flatten() for value in values]).norm()
torch.testing.assert_close(norms["llm"], expected)
torch.testing.assert_close(norms["vision"], values[1].abs()[0])
dist.destroy_process_group()
"""


def scalars(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rates_norms_and_learning_rates_of_each_part_are_logged(world, tmp_path):
    folder = world.fit(
        tmp_path / "run",
        "--throughput.peak_tflops=0.5",
        "--trainer.enable_progress_bar=false",
        "--stage.lr_llm=5e-4",
    )
    found = scalars(folder)
    parts = ("vision", "connector", "llm")
    for step in range(3):
        assert found["perf/mfu"][step] == pytest.approx(found["perf/tflops_per_s"][step] / 0.5, rel=1e-5)
        squares = sum(found[f"train/gradient_norm/{part}"][step] ** 2 for part in parts)
        assert squares**0.5 == pytest.approx(found["train/gradient_norm"][step], rel=1e-5)
    assert found["lr/llm"][0] == pytest.approx(found["lr/vision"][0] / 2)
    assert found["lr/connector"] == found["lr/vision"]
    ratio = [
        tokens / tiles for tokens, tiles in zip(found["perf/tokens_per_s"], found["perf/tiles_per_s"], strict=True)
    ]
    # 16 tokens a tile and some text; the first step's four samples have 212 tokens and 6 tiles.
    assert ratio[0] == pytest.approx(212 / 6, rel=1e-5)
    assert found["perf/memory_gib"][0] > 0.05


def test_every_value_is_logged_at_its_step(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--trainer.log_every_n_steps=2", "--stage.max_steps=5"]
    events = EventAccumulator(str(world.fit(tmp_path / "run", *options)))
    events.Reload()
    tags = [
        "train/loss",
        "train/gradient_norm",
        "train/gradient_norm/llm",
        "train/loss/made",
        "perf/tokens_per_s",
    ]
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == [2, 4], tag
    assert "step" not in events.Tags()["scalars"]
    lines = [json.loads(line) for line in (tmp_path / "run/ledger/rank00000.jsonl").read_text().splitlines()]
    for event in events.Scalars("train/loss"):
        micros = [line for line in lines if line.get("step") == event.step]
        counts = [sum(line["supervised"]) for line in micros]
        mean = sum(line["loss"] * n for line, n in zip(micros, counts, strict=True)) / sum(counts)
        assert len(micros) == 2 and event.value == pytest.approx(mean, rel=1e-6), "over the whole step"


def test_without_a_peak_there_is_no_mfu_and_frozen_parts_have_no_norm(world, tmp_path):
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", "--stage.lr_vision=null")
    found = scalars(folder)
    assert "perf/mfu" not in found
    assert found["perf/tflops_per_s"][0] > 0
    assert "train/gradient_norm/vision" not in found
    assert "lr/vision" not in found
    assert {"train/gradient_norm/llm", "lr/llm"} <= set(found)


def test_values_by_hand():
    measured = Throughput(peak_tflops=2e-12)
    assert measured.peak == 2.0
    measured.work = Work(vision=2.0, connector=3.0, llm=1.0, attention=0.5, head=4.0)
    total = {"tiles": 4, "tokens": 10, "pairs": 20, "supervised": 5}
    found = measured.metrics({**total, "memory/0": 2**30, "memory/1": 2**31}, seconds=5.0, world_size=2)
    assert found.pop("perf/tflops_per_s") == pytest.approx(6e-12)  # 20 + 10 + 10 + 20 in 5 s on 2 devices
    assert found == {
        "perf/tokens_per_s": 2.0,
        "perf/tiles_per_s": 0.8,
        "perf/memory_gib": 2.0,
        "perf/mfu": 3.0,
    }


def test_memory_is_that_of_the_process():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc")
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(1024 * peak, rel=0.05)


def test_a_peak_must_be_positive():
    with pytest.raises(ConfigError, match=r"throughput\.peak_tflops=0\.0: expected a positive number"):
        Throughput(peak_tflops=0.0)


def test_a_model_that_cannot_be_counted_trains_all_the_same(world, tmp_path, caplog, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("looks at values")

    monkeypatch.setattr("callbacks.throughput.stage_work", refuse)
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", "--throughput.peak_tflops=1")
    assert "no MFU: the work of this model cannot be counted (looks at values)" in caplog.text
    assert "perf/tflops_per_s" not in scalars(folder)
    assert "perf/tokens_per_s" in scalars(folder)


def test_the_bar_shows_what_the_callbacks_have_logged_last():
    callbacks = [SimpleNamespace(latest={"perf/mfu": 0.123, "lr/llm": 1e-5}), SimpleNamespace()]
    callbacks.append(SimpleNamespace(latest={"data/wait_share": 0.02, "perf/memory_gib": 61.25}))
    callbacks.append(SimpleNamespace(latest={"train/loss/made": 1.25, "perf/tokens_per_s": 1234.4}))
    norms = {"train/gradient_norm/llm": torch.tensor(0.5), "train/gradient_norm": torch.tensor(0.75)}
    values = latest(SimpleNamespace(callbacks=callbacks, logged_metrics=norms))
    assert shown(values) == {
        "tokens/s": "1234",
        "MFU": "12.3%",
        "wait": "2%",
        "GiB": "61.2",
        "loss made": "1.250",
        "norm llm": "0.5",
        "lr llm": "1e-05",
    }


def test_norms_of_a_part_are_over_all_its_groups():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    for parameter, value in zip(parameters, (3.0, 4.0, 12.0), strict=False):
        parameter.grad = torch.tensor([value])
    groups = [
        {"name": "llm/decay", "params": parameters[:2]},
        {"name": "llm/no_decay", "params": parameters[2:3]},
        {"name": "vision/decay", "params": parameters[3:]},  # has no gradient
    ]
    assert {part: float(norm) for part, norm in gradient_norms(groups).items()} == {
        "llm": 13.0,
        "vision": 0.0,
    }


@pytest.mark.slow
def test_norms_of_sharded_gradients_are_those_of_the_whole(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    run_programs(*[[script, rank, (tmp_path / "meeting").as_uri()] for rank in range(2)])
