"""One run whose strategy and number of ranks change wherever it is stopped, against one process that never was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignvlm_pl.utils.stop_signals import EXIT_CODE
from callbacks.ledger_file import read_step
from tests.drills.stages import fit, with_signals, write_recipe

STAGE = "1-first"
STARTS = (  # of the steps 1, 2, …: ranks and strategy
    (2, "alignvlm_pl.strategies.fsdp.ShardedStrategy"),
    (2, "ddp"),
    (2, "alignvlm_pl.strategies.fsdp.ShardedStrategy"),
    (1, ""),
)


def losses(run: Path, step: int) -> dict[str, float]:
    """Key -> loss of each sample of a step, on all ranks."""
    lines = [entry.line for entry in read_step(run / STAGE / "ledger", step)]
    return {key: loss for line in lines for key, loss in zip(line["keys"], line["losses"], strict=True)}


def start(folder: Path) -> Path:
    """Weights to begin with: a sharded model draws its random ones rank by rank."""
    from alignvlm_pl.models.build import build_model, build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    spec = tiny_spec(folder / "tokenizer")
    build_model(spec, build_processor(spec)).save_pretrained(folder / "start")
    return folder / "start"


@pytest.mark.slow
def test_a_stopped_run_resumes_under_any_strategy(tmp_path):
    command = [*write_recipe(tmp_path, steps=len(STARTS), stages=1), f"--model.weights={start(tmp_path)}"]
    done = fit(tmp_path / "whole", command)
    assert done.returncode == 0, done.output[-3000:]
    places = [{"place": "step", "stage": STAGE, "step": step} for step in range(len(STARTS) - 1)]
    with_signals(tmp_path, *places)
    statuses = []
    for ranks, strategy in STARTS:
        done = fit(tmp_path / "changed", command, world=ranks, strategy=strategy)
        statuses.append(done.returncode)
        assert "Traceback" not in done.output, done.output[-3000:]
    assert statuses == [EXIT_CODE] * len(places) + [0]

    # Measured worst cases: no digit of a loss, 1.2e-7 of a weight.
    for step in range(1, len(STARTS) + 1):
        found, expected = losses(tmp_path / "changed", step), losses(tmp_path / "whole", step)
        assert found == pytest.approx(expected, rel=5e-7), step
    weights = [load_file(tmp_path / run / STAGE / "hf/model.safetensors") for run in ("changed", "whole")]
    for name, value in weights[1].items():
        if not name.endswith("k_proj.bias"):  # a gradient of rounding alone, of which Adam makes whole steps
            torch.testing.assert_close(weights[0][name], value, rtol=0, atol=6e-7, msg=lambda m, n=name: f"{n}: {m}")
