"""What a sharded model sends: counted in one process that takes itself for a rank of two nodes with two devices."""

from collections import Counter
from contextlib import nullcontext, suppress
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.strategies.fsdp import ShardedStrategy
from alignvlm_pl.strategies.meta_init import own_rows
from alignvlm_pl.strategies.sharded_checkpoint import rank_state
from alignvlm_pl.strategies.sharding import shard
from alignvlm_pl.training.optim import clip_gradients, gradient_norms

RANKS = 4
COPIES = (2, 2), ("copies", "shards")
ALL = (RANKS,), ("data_parallel",)


class Collectives(TorchDispatchMode):
    """Counts operations on the process group, by name, and those of DTensors."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.found[function._opname] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def make(tmp_path):
    """Shards the tiny model over a mesh; the other ranks send nothing."""

    def build(mesh, *, rank=0, policy=None):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        shape, names = mesh
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
        spec = tiny_spec(tmp_path)
        model = build_model(spec, build_processor(spec))
        shard(model, mesh, policy=policy or MixedPrecisionPolicy())
        return model

    return build


def micro_batch(model, counter=None):
    """Forward and backward of one page; `counter` sees what is sent."""
    tokens = model.config.tokens_per_tile
    ids = torch.full((1, tokens + 4), 5)
    ids[:, :tokens] = model.config.image_token_id
    tiles = torch.rand(1, 3, 56, 56) * 2 - 1
    with counter or nullcontext():
        model(
            input_ids=ids, pixel_values=tiles, num_tiles=torch.tensor([1]), labels=ids.clip(max=5)
        ).loss_sum.backward()


def count_step(model, *, whole, micro_batches=3):
    """Reductions of gradients in the micro batches of an optimizer step, each on its own."""
    counts, strategy = [], ShardedStrategy(sync_every_micro_batch=not whole)
    strategy._sharded = model
    for number in range(micro_batches):
        counter = Collectives()
        last = number == micro_batches - 1
        with nullcontext() if last else strategy.block_backward_sync():
            micro_batch(model, counter)
        counts.append((counter.found["_reduce_scatter_base_"], counter.found["allreduce_"]))
    return counts


def test_copies_on_nodes_meet_once_a_step(make):
    *early, last = count_step(make(COPIES), whole=False)
    groups = last[0]
    assert groups > 3
    assert early == [(groups, 0)] * 2, "within the node alone"
    assert last == (groups, groups)


@pytest.mark.parametrize("mesh", [COPIES, ALL], ids=["copies", "one mesh"])
def test_with_whole_gradients_nothing_is_reduced_before_the_end_of_a_step(make, mesh):
    *early, last = count_step(make(mesh), whole=True)
    assert early == [(0, 0)] * 2
    assert last[0] > 3
    assert last[1] == (last[0] if mesh is COPIES else 0)


def test_norms_of_all_parts_are_one_reduction_and_clipping_sends_nothing(make):
    model = make(COPIES)
    micro_batch(model)
    named = {"vision": model.vision_tower, "connector": model.connector, "llm": model.language_model}
    groups = [{"name": f"{part}/decay", "params": [*module.parameters()]} for part, module in named.items()]
    parameters = [p for group in groups for p in group["params"]]
    for number, parameter in enumerate(parameters, 1):  # what a fake process group gathers is arbitrary, even NaN
        parameter.grad.to_local().fill_(number / len(parameters))
    before = [p.grad.to_local().clone() for p in parameters]
    counter = Collectives()
    with counter:
        norms = gradient_norms(groups)
        total = torch.linalg.vector_norm(torch.stack([*norms.values()]))
        clip_gradients(parameters, 0.5 * float(total), total)
    assert counter.found == {"allreduce_": 1}
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad.to_local(), gradient * 0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rank", "writes"), [(1, True), (3, False)])
def test_each_node_has_all_rows_and_the_first_one_writes_them(make, rank, writes):
    # Of a name of its own: torch keeps what it found out about a mesh, and would take another rank's.
    model = make(((2, 2), (f"copies{rank}", "shards")), rank=rank)
    name, tensor = next((name, p) for name, p in model.named_parameters() if len(p) % 2 == 0)
    half = len(tensor) // 2
    assert own_rows(len(tensor), tensor) == slice(half, 2 * half)
    own = rank_state({"state_dict": {name: tensor}}, rank=rank)["state_dict"][name]
    assert len(own["values"]) == (half if writes else 0)
    assert own["shape"] == list(tensor.shape)


@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(torch.bfloat16, torch.float32)])
def test_the_connectors_norms_are_gathered_as_they_are_kept(make, policy):
    model = make(ALL, policy=policy)
    seen = {}
    model.connector.norm1.register_forward_hook(lambda norm, *_: seen.update(norm1=norm.weight.dtype))

    def record(module, inputs):
        seen.update(
            w1=module.weight.dtype, norm2=model.connector.norm2.weight.dtype, whole=len(model.connector.norm2.weight)
        )

    model.connector.w1.register_forward_pre_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        micro_batch(model)
    matrix = torch.float32 if policy is None else torch.bfloat16
    norm2 = model.connector.norm2.weight
    assert seen == {"w1": matrix, "norm1": torch.float32, "norm2": torch.float32, "whole": len(norm2)}
    assert norm2.grad is not None and norm2.grad.dtype == torch.float32
    assert isinstance(norm2, DTensor), "freed behind the backward"


def test_a_node_with_one_device_has_nothing_to_shard_over(monkeypatch):
    strategy = ShardedStrategy(shard_within_node=True)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")], 2
    with pytest.raises(ConfigError, match=r"shard_within_node needs several devices a node, trainer.devices is 1"):
        strategy.setup_environment()


def test_ranks_wait_for_each_other_as_long_as_the_strategy_says(monkeypatch):
    given = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.update(kwargs))
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=ShardedStrategy(timeout_minutes=7), logger=False)
    with suppress(Exception):  # there is no group behind it
        trainer.strategy.setup_environment()
    assert given["timeout"] == timedelta(minutes=7)
