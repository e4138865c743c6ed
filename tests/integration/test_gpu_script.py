"""perf/gpu.py on a CPU and tiny sizes: the parts run, write the page, and survive each other's failure."""

import argparse
import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

PERF = Path(__file__).parents[2] / "perf"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(PERF)
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_the_parts_run_on_a_cpu_and_write_the_page(gpu, tmp_path, capsys):
    page = tmp_path / "gpu.md"
    options = ["--device=cpu", "--size=tiny", "--rounds=1", "--json", "--out", str(page)]
    assert gpu.main(options) == 1  # flex attention and Liger do not run on a CPU
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    failed = [name for part in gpu.PARTS for name, values in found[part].items() if "failed" in values]
    assert [name.split(",")[0] for name in failed if "flash" not in name] == ["flex_attention", "liger"]
    assert {values["verdict"] for values in found["parity"].values()} == {"as expected"}
    rates = [values["TFLOP/s"] for part in ("align", "step") for values in found[part].values() if "ms" in values]
    assert len(rates) == 8 + 4
    assert min(rates) > 0
    assert 0 < found["step"]["2 tiles, float32 weights (one GPU, ddp)"]["counted GiB"] < 4
    text = page.read_text("utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu.PARTS)
    assert f"| torch | {torch.__version__.split('+')[0]}" in text
    assert "| card | none: " in text
    assert "at least 550 TFLOP/s" in text


def test_what_a_case_raises_is_its_result(gpu, monkeypatch):
    def cases(bench):
        def fail(error):
            raise error

        yield "memory", lambda: fail(torch.OutOfMemoryError("CUDA out of memory.\n9 GiB"))
        yield "other", lambda: fail(ValueError("so | so"))
        yield "last", lambda: {"ms": 1.23456}

    monkeypatch.setitem(gpu.PARTS, "parity", cases)
    found = {}
    options = argparse.Namespace(device="cpu", size="tiny", verbose=False)
    gpu.measure(gpu.Bench(options), "parity", found.__setitem__)
    assert found == {
        "memory": {"failed": "out of memory: CUDA out of memory. 9 GiB"},
        "other": {"failed": "ValueError: so | so"},
        "last": {"ms": 1.23456},
    }
    page = gpu.page({"card": "x"}, {"parity": found})
    assert "| other | failed ValueError: so / so |" in page
    assert "| last | ms 1.235 |" in page


@pytest.mark.parametrize(
    ("ends", "rest"),
    [
        (lambda: os._exit(3), "the process ended with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ended with status -9"),
        (lambda: time.sleep(60), "not finished after 1.0 s"),
        (lambda: None, None),
    ],
    ids=["exits", "killed", "hangs", "ends"],
)
def test_a_part_that_dies_or_hangs_leaves_what_it_found(gpu, ends, rest):
    def child(options, part, pipe):
        pipe.send(("first", {"ms": 1.0}))
        ends()
        pipe.send(None)

    found = {}
    gpu.measure_alone(argparse.Namespace(part_seconds=1.0), "parity", found.__setitem__, child)
    assert found.pop("first") == {"ms": 1.0}
    assert found == ({} if rest is None else {"the rest": {"failed": rest}})


def test_a_gpu_that_is_not_there_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="--device cuda: there is no CUDA device here"):
        gpu.main(["--device=cuda"])
    assert gpu.parse([]).out is None, "no page without a GPU"
