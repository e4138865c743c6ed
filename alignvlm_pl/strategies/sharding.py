"""A model whose parameters are sharded over ranks by FSDP2 (`fully_shard`), and calls of its parts.

Gathered together are each layer of the vision tower, the rest of the tower, the connector, each layer of the LLM, an
untied head, and the root with what is left. The root's parameters are there as long as the model runs: ALIGN reads
the LLM's embedding table before the LLM does.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def is_sharded_tensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each rank has some of its rows; others are whole on every rank."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


def shard_dim(tensor: DTensor) -> int:
    """The dimension of its mesh over which a tensor is sharded; over the others it is replicated."""
    return next(dim for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank's rows of a sharded tensor are the first of those that several ranks have alike."""
    return all(
        tensor.device_mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def shard(
    model: Any, mesh: DeviceMesh, *, policy: MixedPrecisionPolicy, reshard_vision: bool = True, reshard_llm: bool = True
) -> None:
    """Shard a model, which may be on the meta device, in place over a mesh, whose first of two dimensions has copies.

    Parameters may not be frozen or unfrozen afterwards. `policy` is the precision in which they are gathered and
    gradients summed; with `reshard_…` the layers of a part are freed after forward and gathered again in backward.
    """
    # Connectors return views, which is harmless as long as nobody changes them in place (models/sequences.py does not).
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

    def wrap(module: nn.Module, reshard: bool | None) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)

    for part, reshard in ((model.vision_tower, reshard_vision), (model.language_model, reshard_llm)):
        for layer in layers(part):
            wrap(layer, reshard)
    wrap(model.vision_tower, reshard_vision)
    if policy.param_dtype is not None:
        _keep_norms_exact(model.connector, mesh, MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype))
    wrap(model.connector, True)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        wrap(head, True)
    wrap(model, None)
    # Ways into a group other than `forward`.
    model.wake = lambda: None
    register_fsdp_forward_method(model, "wake")
    register_fsdp_forward_method(model, "read")
    register_fsdp_forward_method(model, "embed_prompt")
    if hasattr(model.connector, "log_probs"):
        register_fsdp_forward_method(model.connector, "log_probs")


def _keep_norms_exact(connector: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Gather the connector's norms in the precision in which they are kept: bfloat16 has steps of 0.0078 near 1.

    ALIGN reads a norm's parameters without calling it, so they are gathered when the connector is called.
    """
    for module in connector.modules():
        if _is_norm(module):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    norms = [module for module in connector.modules() if isinstance(module, FSDPModule)]

    @torch.compiler.disable
    def gather() -> None:
        for norm in norms:
            norm.unshard()

    for name in ("forward", "log_probs"):
        if method := getattr(connector, name, None):
            setattr(connector, name, _after(gather, method))


def _is_norm(module: nn.Module) -> bool:
    sizes = {parameter.ndim for parameter in module.parameters()}
    return "norm" in type(module).__name__.lower() and sizes == {1}


def _after(first: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return method(*args, **kwargs)

    return call


def layers(part: nn.Module) -> list[nn.Module]:
    """The repeated layers of a part: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in part.children():
        found += list(child) if isinstance(child, nn.ModuleList) else layers(child)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded, so that all ranks must call it equally often."""
    return isinstance(model, FSDPModule)


@contextmanager
def gradients_kept(model: Any, *, whole: bool) -> Iterator[None]:
    """Add gradients up without a reduction over all ranks, which the next backward outside of this does.

    With `whole` nothing is reduced; else those of a mesh with two dimensions are, over the shards alone.
    """
    block = model.set_requires_gradient_sync if whole else model.set_requires_all_reduce
    block(False)
    try:
        yield
    finally:
        block(True)


@contextmanager
def gathered_parts(model: Any) -> Iterator[None]:
    """Gather what the parts of a sharded model need, while they are called directly and without gradients.

    The embedding table, the connector and the head are whole within, in the precision of the forward; the tower and the
    layers gather their own when they run, which all ranks must do equally often. Changes made within are lost.
    """
    if not is_sharded(model):
        yield
        return
    model.wake()  # the first call decides which module is the root
    parts = (model, *model.connector.modules(), model.get_output_embeddings())
    held = [part for part in parts if isinstance(part, FSDPModule)]
    for part in held:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in held:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def no_grad(model: nn.Module) -> Any:
    """`torch.inference_mode`; `torch.no_grad` for a sharded model, whose gathered tensors are used in training too."""
    return torch.no_grad() if is_sharded(model) else torch.inference_mode()
