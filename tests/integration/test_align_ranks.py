"""ALIGN in chunks on two real processes (gloo): DDP, FSDP and sharded rows give the gradients of one process."""

from pathlib import Path

import pytest
import torch

from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]

RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from alignvlm_pl.models.align import AlignConnector

kind, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
kept = [4, 7, 50, 97, 100] if sys.argv[4] == "pruned" else None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(101, 6)
        self.connector = AlignConnector(5, 6, 101, gain_init=3.0, backend="chunked", vocab_keep=kept)

    def forward(self, features):
        # The table enters twice, as in the model: looked up, and mixed.
        mixed = self.connector(features, self.table.weight, columns=torch.tensor([4, 100]))
        return mixed.embeds + self.table(torch.tensor([3])), mixed.log_probs


def step(model, features):
    embeds, log_probs = model(features)
    (embeds.square().sum() + log_probs.square().sum()).backward()


torch.manual_seed(0)
model, features = Model(), torch.randn(4, 3, 5)
if kind == "one":
    step(model, features)
    found = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
else:
    dist.init_process_group("gloo", init_method=(folder / f"meeting-{kind}").as_uri(), rank=rank, world_size=2)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    elif kind == "rows":
        # Each rank holds some rows of everything that has a row for each token, and sees all features.
        mesh = init_device_mesh("cpu", (2,))
        for owner in (model.table, model.connector.w2, model.connector.norm2):
            for name, value in list(owner.named_parameters()):
                setattr(owner, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)])))
        connector, table = model.connector, model.table.weight

        def wrapped(features):
            mixed = connector(features, table, columns=torch.tensor([4, 100]))
            return mixed.embeds + table.full_tensor()[3], mixed.log_probs
    else:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.connector, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    step(wrapped, features if kind == "rows" else features[2 * rank : 2 * rank + 2])
    if kind == "ddp":
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
    elif kind == "rows":
        found = {
            name: (value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad) / 2
            for name, value in model.named_parameters()
        }
    else:
        found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    dist.barrier()
    dist.destroy_process_group()
torch.save(found, folder / f"{kind}-{rank}.pt")
"""


def run(folder, kind, vocabulary, ranks):
    script = folder / "rank.py"
    script.write_text(RANK)
    run_programs(*[[script, kind, rank, folder, vocabulary] for rank in range(ranks)])
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [("ddp", "whole"), ("fsdp", "whole"), ("rows", "whole"), ("rows", "pruned")],
)
def test_two_processes_have_the_gradients_of_one(tmp_path, kind, vocabulary):
    (expected,) = run(tmp_path, "one", vocabulary, 1)
    assert set(expected) >= {"table.weight", "connector.w2.weight", "connector.norm2.weight"}
    for found in run(tmp_path, kind, vocabulary, 2):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Sums of float32 in another order; measured 2e-6 of the largest.
            torch.testing.assert_close(
                found[name],
                value,
                rtol=0,
                atol=1e-5 * float(value.abs().max()),
                msg=lambda m, n=name: f"{n}: {m}",
            )
