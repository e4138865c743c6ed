"""A model whose parameters are sharded over ranks: wrapping by FSDP2 (`fully_shard`), calling its parts.

The groups whose parameters are gathered together: each layer of the vision tower, the rest of the tower, the connector,
each layer of the LLM, a head that is not tied, and the root with what is left. The root's parameters are there as long
as the model runs, which ALIGN needs: it reads the LLM's embedding table before the LLM does.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (DTensor) on every rank, a collective that all ranks must call; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(
    model: Any,
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy,
    reshard_vision: bool = True,
    reshard_llm: bool = True,
) -> None:
    """Shard a model, which may be on the meta device, in place over a mesh of one dimension.

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
    wrap(model.connector, True)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        wrap(head, True)
    wrap(model, None)
    # Ways into a group other than `forward`.
    model.wake = lambda: None
    register_fsdp_forward_method(model, "wake")
    register_fsdp_forward_method(model, "read")
    if hasattr(model.connector, "log_probs"):
        register_fsdp_forward_method(model.connector, "log_probs")


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
def gathered_parts(model: Any) -> Iterator[None]:
    """Gather what the parts of a sharded model need, while they are called directly and without gradients.

    The embedding table, the connector and the head are whole within, in the precision of the forward; the tower and the
    layers gather their own when they run, which all ranks must do equally often. Changes made within are lost.
    """
    if not is_sharded(model):
        yield
        return
    model.wake()  # the first call decides which module is the root
    held = [part for part in (model, model.connector, model.get_output_embeddings()) if isinstance(part, FSDPModule)]
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
