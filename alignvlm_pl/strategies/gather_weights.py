"""Weights of a sharded model, gathered one tensor at a time into the files that `save_pretrained` would write."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from .meta_init import names_by_tensor
from .sharding import full_tensor

FILE_SIZE = "5GB"
"""Most bytes of a file unless told otherwise, and of what the writing rank holds in memory."""
_PATTERN = "model{suffix}.safetensors"


class WholeTensor(NamedTuple):
    """A gathered tensor on the CPU, and the file that it belongs to."""

    file: str
    name: str
    value: Tensor


def whole_weights(
    model: nn.Module, max_shard_size: str = FILE_SIZE, *, keep: bool = True
) -> Iterator[WholeTensor]:
    """Gather every tensor of the model's state once, file by file. All ranks must go through to the end.

    Args:
        model: A sharded model.
        max_shard_size: Most bytes of a file.
        keep: Whether this rank wants them; the others' are not copied to the CPU.
    """
    tensors = {names[0]: tensor for names, tensor in names_by_tensor(model)}
    for file, names in _plan(tensors, max_shard_size).filename_to_tensors.items():
        for name in names:
            value = full_tensor(tensors[name]).detach()
            yield WholeTensor(file, name, value.cpu().contiguous() if keep else value)


def write_weights(
    model: Any, weights: Iterator[WholeTensor], folder: Path, *, max_shard_size: str = FILE_SIZE
) -> None:
    """Write configuration and weights as `save_pretrained` of the unsharded model would.

    Args:
        model: A sharded `PreTrainedModel`.
        weights: Of `whole_weights`, with the same `max_shard_size`.
        folder: Where to; it is made.
        max_shard_size: Most bytes of a file.
    """
    folder.mkdir(parents=True)
    plan = _plan({names[0]: tensor for names, tensor in names_by_tensor(model)}, max_shard_size)
    if plan.is_sharded:
        parameters = {"total_parameters": sum(p.numel() for p in model.parameters())}
        index = {"metadata": parameters | plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    for file, names in plan.filename_to_tensors.items():
        held = {}
        for _ in names:
            gathered = next(weights)
            held[gathered.name] = gathered.value
        save_file(held, folder / file, metadata={"format": "pt"})
    # `fully_shard` puts a prefix before the name of a class.
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _plan(tensors: dict[str, Tensor], max_shard_size: str) -> Any:
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }
    return split_torch_state_dict_into_shards(
        shapes, filename_pattern=_PATTERN, max_shard_size=max_shard_size
    )
