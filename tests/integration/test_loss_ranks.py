"""The chunked loss on two real processes (gloo): DDP, and heads that FSDP has sharded."""

from pathlib import Path

import pytest
import torch

from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]

RANK = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from alignvlm_pl.models.losses import supervised_cross_entropy

kind, rank, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, states, labels):
        hidden = self.body(states).tanh()
        return supervised_cross_entropy(hidden, labels, self.head, backend="chunked", chunk_tokens=2).total

torch.manual_seed(0)
model, states = Model(), torch.randn(2, 7, 6)
labels = torch.randint(16, (2, 7))
labels[1, 2:] = -100  # six supervised positions and one: other numbers of chunks on the two ranks
if ranks == 1:
    for _ in range(2):
        model(states, labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
else:
    dist.init_process_group("gloo", init_method=(folder / f"meeting-{kind}").as_uri(), rank=rank, world_size=2)
    if kind == "ddp":
        wrapped = DDP(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        if kind == "fsdp-head":
            fully_shard(model.head, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    for _ in range(2):
        wrapped(states[rank:rank + 1], labels[rank:rank + 1]).backward()
    gradients = {
        name.removeprefix("module."): p.grad if kind == "ddp" else p.grad.full_tensor()
        for name, p in wrapped.named_parameters()
    }
    gradients = {name: 2 * grad for name, grad in gradients.items()}  # averaged over ranks
    dist.barrier()
torch.save(gradients, folder / f"{kind}-{rank}.pt")
if ranks > 1:
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the process while it is taken down
"""


def gradients(folder: Path, kind: str, *, ranks: int) -> list[dict[str, torch.Tensor]]:
    script = folder / "rank.py"
    script.write_text(RANK)
    run_programs(*[[script, kind, rank, ranks, folder] for rank in range(ranks)])
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp-root", "fsdp-head"])
def test_two_ranks_give_the_gradients_of_one(tmp_path, kind):
    (expected,) = gradients(tmp_path, "one", ranks=1)
    for found in gradients(tmp_path, kind, ranks=2):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # float32, sums in another order. Measured worst case: 1e-6 of gradients up to 6.
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
