"""Checksums of frozen tensors: one bit is seen, shards add up, and names survive wrappers."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.training.frozen import checksums, compare_checksums, frozen_tensors
from alignvlm_pl.training.stage import Stage


def checksum(tensor: torch.Tensor) -> int:
    return checksums({"x": tensor})["x"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_one_element_changes_it_and_a_copy_does_not(dtype, shape):
    value = (torch.rand(shape) * 100).to(dtype)
    assert checksum(value) == checksum(value.clone())
    for place in range(value.numel()):
        other = value.clone()
        bits = other.view(-1).view(torch.uint8)
        bits[place * value.element_size()] ^= 1
        assert checksum(other) != checksum(value)


def test_it_is_the_weighted_sum_of_the_bits():
    assert checksum(torch.tensor([[3, 5], [7, -1]], dtype=torch.int32)) == 3 * 1 + 5 * 3 + 7 * 5 - 1 * 7
    # 1.0 and -2.0 as IEEE 754 numbers, by hand.
    assert checksum(torch.tensor([1.0, -2.0])) == 0x3F800000 + 3 * (0xC0000000 - 2**32)


def test_equal_numbers_in_another_place_and_another_zero_are_seen():
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.eye(4)[:, :3]) == checksum(torch.eye(4)[:, :3].contiguous()), (
        "not a matter of memory"
    )


def test_pieces_of_a_large_tensor_are_counted_through(monkeypatch):
    value = torch.randn(50, 7)
    whole = checksum(value)
    monkeypatch.setattr("alignvlm_pl.training.frozen._CHUNK", 20)
    assert checksum(value) == whole


class Net(nn.Module):
    """The three parts, the first with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.vision_tower.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.connector = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.language_model = nn.Linear(2, 2)


def test_frozen_are_parameters_without_gradient_and_saved_buffers_of_frozen_parts():
    net = Net()
    net.vision_tower.requires_grad_(False)
    net.language_model.bias.requires_grad_(False)
    tower = {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    expected = {f"vision_tower.{name}" for name in tower} | {"language_model.bias"}
    stage = Stage(name="x", lr_connector=1e-3, lr_llm=1e-3)
    assert set(frozen_tensors(net, stage)) == expected
    net.vision_tower.compile(backend="eager")
    assert set(frozen_tensors(net, stage)) == expected, "a run may be resumed compiled"


def test_a_change_is_named_with_both_checksums():
    with pytest.raises(
        CheckpointError, match=r"'s' does not train b, but it changed: checksum 0+2 .* 0+3 now \(1 of 2"
    ):
        compare_checksums({"a": 1, "b": 3}, {"a": 1, "b": 2}, stage="s")
    with pytest.raises(CheckpointError, match="absent now"):
        compare_checksums({}, {"b": -1}, stage="s")
    compare_checksums({"a": 1, "new": 2}, {"a": 1}, stage="s")


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from alignvlm_pl.training.frozen import checksums

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
for shape in ((7, 3), (1, 5), (4, 2, 2), (3,)):
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 0.3
    whole = checksums({"x": value})["x"]
    for placement in (Shard(0), Shard(len(shape) - 1), Replicate()):
        sharded = distribute_tensor(value, mesh, [placement])
        found = checksums({"plain": value, "x": sharded, "y": sharded + 1})
        assert found["x"] == whole == found["plain"] != found["y"], (shape, placement, found, whole)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_two_ranks_add_up_to_the_checksum_of_the_whole(tmp_path):
    import subprocess

    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(tmp_path / "store")],
            cwd=root, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, told = rank.communicate(timeout=120)
        assert rank.returncode == 0, told[-2000:]
