"""A model whose parameters have shapes but no memory, and weights read into them a slice at a time.

A sharded model is never whole on any rank: it is built on the meta device, sharded, and each rank then reads its rows
from the safetensors files.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from ..errors import CheckpointError
from ..models.build import ModelSpec, build_config, set_generation
from ..models.configuration import AlignVLMConfig
from ..models.loading import require_complete, require_model_type
from ..models.modeling import AlignVLMForConditionalGeneration, connector_from_config
from ..models.processing import AlignVLMProcessor
from ..models.vision import build_vision_tower
from .sharding import shard_dim

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_NESTED = "vision_model."  # transformers nests SigLIP and CLIP one level deeper in some versions


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, the parameters of new modules are on the meta device; buffers, which files may lack, are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_on_meta(spec: ModelSpec, processor: AlignVLMProcessor, *, whole: bool) -> AlignVLMForConditionalGeneration:
    """Build the model without memory for what `load_parts` reads; only parts with random weights are real.

    With `whole` all weights come from one folder, else those of the pretrained parts do.
    """
    config = build_config(spec, image_token_id=processor.image_token_id)
    with parameters_on_meta():
        model = AlignVLMForConditionalGeneration(config)
    set_generation(model, processor)
    if whole:
        return model
    if spec.vision.pretrained is None:
        model.vision_tower = build_vision_tower(config.vision_config, config.vision_feature)
    if spec.llm.pretrained is None:
        model.language_model = AutoModelForCausalLM.from_config(config.text_config)
    model.connector = connector_from_config(config)
    model.connector.apply(model._init_weights)
    return model


def load_parts(model: AlignVLMForConditionalGeneration, spec: ModelSpec, folder: str | Path | None) -> None:
    """Read the weights of a sharded model of `build_on_meta`, on each rank its own rows; errors as of `load_rows`.

    They are those of a saved AlignVLM, `folder`, or else of the pretrained parts of `spec`.
    """
    if folder is not None:
        require_model_type(folder, AlignVLMConfig.model_type)
        load_rows(model, folder, what="AlignVLM", strict=True)
        return
    if (source := spec.vision.folder()) is not None:
        load_rows(model.vision_tower, source, what="vision")
    if (source := spec.llm.folder()) is not None:
        load_rows(model.language_model, source, what="LLM")
    model.initialize_connector()


def load_rows(module: PreTrainedModel, source: str | Path, *, what: str, strict: bool = False) -> None:
    """Read a module's tensors from safetensors files of a folder or hub id; of a sharded one this rank's rows.

    `what` names the module in errors; with `strict` the files may hold nothing else. A CheckpointError if there are no
    such files, or a tensor is missing, left over, or of another shape.
    """
    files, missing, used = _Files(source, what=what), set(), set()
    for aliases, tensor in names_by_tensor(module):
        spellings = (key for name in aliases for key in (name, _NESTED + name, name.removeprefix(_NESTED)))
        key = next((key for key in spellings if key in files.places), None)
        if key is None:
            missing.add(aliases[0])
            continue
        used.add(key)
        found = files.read(key, tensor)
        for name in aliases:
            path, _, own = name.rpartition(".")
            setattr(module.get_submodule(path), own, found)
    require_complete(missing, what=what, source=source)
    if strict and (extra := sorted(files.places.keys() - used)):
        raise CheckpointError(
            f"{what} weights in {source} hold {len(extra)} tensors that the model lacks, first {extra[0]!r}; use the "
            "model config that they were trained with"
        )


def own_rows(length: int, tensor: Tensor) -> slice:
    """Of a dimension that `fully_shard` divides, the part of this rank: equal parts, the last ones shorter or empty."""
    if not isinstance(tensor, DTensor):
        return slice(0, length)
    mesh, dim = tensor.device_mesh, shard_dim(tensor)
    part = -(-length // mesh.size(dim))
    start = min(mesh.get_local_rank(dim) * part, length)
    return slice(start, min(start + part, length))


def like(tensor: Tensor, local: Tensor) -> Tensor:
    """`local` as a tensor of the kind that `tensor` is: the rows of this rank of a sharded one, or all of it."""
    if not isinstance(tensor, DTensor):
        return local
    assert local.shape == tensor.to_local().shape, "own_rows cuts as fully_shard does"
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


class _Files:
    """The safetensors files of a folder or hub id."""

    def __init__(self, source: str | Path, *, what: str) -> None:
        self.source, self.what = source, what
        try:
            names = [_SINGLE]
            if (index := self._find(_INDEX)) is not None:
                names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            files = [safe_open(self._find(name, required=True), "pt") for name in names]
            self.places: dict[str, Any] = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._error(error) from error

    def _find(self, name: str, *, required: bool = False) -> Any:
        return cached_file(str(self.source), name, _raise_exceptions_for_missing_entries=required)

    def read(self, key: str, tensor: Tensor) -> Tensor:
        """What `tensor` owns of the tensor `key`, in its precision, on the device it is to have."""
        try:
            stored = self.places[key].get_slice(key)
            shape = tuple(stored.get_shape())
            if shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self.what} weights in {self.source} have {key!r} of shape {shape}, the model's is "
                    f"{tuple(tensor.shape)}; use the model config that they were trained with (a sharded model is not "
                    "pruned while it is loaded: let `prune` write the folder first)"
                )
            values = stored[own_rows(shape[0], tensor)] if shape else self.places[key].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise self._error(error) from error
        device = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else None
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        values = values.to(device=device, dtype=tensor.dtype, copy=True)
        found = like(tensor, values)
        return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found

    def _error(self, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return CheckpointError(
            f"{self.what} weights cannot be read in slices from {str(self.source)!r}: {reason}; a sharded model needs "
            "a folder or hub id with model.safetensors or its index"
        )


def names_by_tensor(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Names of each tensor of the state, tied ones together."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    persistent = module.state_dict().keys()
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        if name in persistent:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())
