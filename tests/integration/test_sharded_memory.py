"""A sharded model is never whole on a rank while it is built and loaded: measured on two real processes (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"llm": {"width": 512, "layers": 12}, "vision": {"width": 256, "layers": 4}}

RANK = """
import json, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from alignvlm_pl.models.build import build_processor
from alignvlm_pl.strategies.meta_init import build_on_meta, load_parts
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.strategies.sharding import shard

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
spec = tiny_spec(folder / f"tokenizer{rank}", **json.loads(sys.argv[3]))
processor = build_processor(spec)
small = tiny_spec(folder / f"tokenizer{rank}")
build_on_meta(small, processor, whole=True)  # everything is imported


def used():
    # Without pages of mapped files, which the system takes back as it likes.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


before = highest = used()
done = False


def watch():
    global highest
    while not done:
        highest = max(highest, used())
        time.sleep(0.001)


watcher = threading.Thread(target=watch)
watcher.start()
model = build_on_meta(spec, processor, whole=True)
built = used() - before
shard(model, mesh, policy=MixedPrecisionPolicy())
load_parts(model, spec, folder / "start")
highest = max(highest, used())
done = True
watcher.join()
whole = sum(4 * parameter.numel() for parameter in model.parameters())
own = sum(4 * parameter.to_local().numel() for parameter in model.parameters())
print(json.dumps([built / whole, (highest - before) / whole, own / whole]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_rank_never_holds_more_than_its_share(tmp_path):
    import json

    from alignvlm_pl.models.build import build_model, build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    spec = tiny_spec(tmp_path / "tokenizer", **SIZES)
    build_model(spec, build_processor(spec)).save_pretrained(tmp_path / "start", max_shard_size="20MB")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path), json.dumps(SIZES)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        told, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-2000:]
        built, highest, own = json.loads(told.splitlines()[-1])
        assert own == pytest.approx(0.5, abs=0.01)
        # Shares of the whole model's bytes. Measured: 0.008 and 0.526; a model that is built whole: 1.009.
        assert built < 0.1
        assert highest < 0.7
