"""Freezing, parameter groups by part, and the learning-rate schedule of a stage."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from ..strategies.sharding import is_sharded_tensor, layers, shard_dim
from ..utils.registry import import_path
from .stage import PARTS, Stage

_MATRIX = ("weight", "proj")
"""Ends of the names of matrices: `weight` in a layer, `proj` where transformers stacks those of experts."""


def freeze(model: nn.Module, stage: Stage) -> None:
    """Apply the stage's freeze table, before a strategy wraps the model.

    Raises:
        ConfigError: A part has fewer blocks than `stage.last_blocks` says.
    """
    for part, rate in stage.learning_rates.items():
        getattr(model, PARTS[part]).requires_grad_(bool(rate))
    for part, blocks in _last_blocks(model, stage):
        getattr(model, PARTS[part]).requires_grad_(False)
        for block in blocks:
            block.requires_grad_(True)


def _last_blocks(model: nn.Module, stage: Stage) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the parts of which only the last blocks train, with these."""
    for part, count in (stage.last_blocks or {}).items():
        yield part, last_blocks(getattr(model, PARTS[part]), count, setting=f"stage.last_blocks.{part}")


def last_blocks(module: nn.Module, count: int, *, setting: str) -> list[nn.Module]:
    """Return the last `count` repeated layers of a part; a ConfigError that names `setting` if it has fewer."""
    blocks = layers(module)
    if count > len(blocks):
        raise ConfigError(f"{setting}={count}: the part has {len(blocks)} blocks; set at most so many")
    return blocks[-count:]


def set_modes(model: nn.Module, stage: Stage) -> None:
    """Put what trains in train mode and what is frozen in eval mode (no dropout, no running statistics)."""
    for part, rate in stage.learning_rates.items():
        getattr(model, PARTS[part]).train(bool(rate))
    for part, blocks in _last_blocks(model, stage):
        getattr(model, PARTS[part]).eval()
        for block in blocks:
            block.train()


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Groups `<part>/decay` and `<part>/no_decay` with their learning rates; frozen parameters are in none.

    Norms, biases, embeddings, a head tied to them, and tables without a module of their own are not decayed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for part, rate in stage.learning_rates.items():
        if not rate:
            continue
        named: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        for name, parameter in getattr(model, PARTS[part]).named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim > 1 and name.endswith(_MATRIX)
                plain = not matrix or id(parameter) in embeddings
                named["no_decay" if plain else "decay"].append(parameter)
        for kind, parameters in named.items():
            if parameters:
                decay = stage.weight_decay if kind == "decay" else 0.0
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": f"{part}/{kind}"})
    return groups


def build_optimizer(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    """Return the stage's optimizer over groups of `parameter_groups`; a ConfigError if `stage.optimizer` makes none."""
    if stage.optimizer is None:
        return torch.optim.AdamW(groups, betas=(0.9, stage.adam_beta2), fused=True)
    path = stage.optimizer["class_path"]
    kind = import_path(path, setting="stage.optimizer")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"stage.optimizer: {path!r} is no torch.optim.Optimizer")
    try:
        return kind(groups, **(stage.optimizer.get("init_args") or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stage.optimizer: {path}: {error}") from error


def check_optimizer(stage: Stage) -> None:
    """Raise a ConfigError if the stage's optimizer cannot be built, or needs a closure or sparse gradients."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = build_optimizer([{"params": [parameter], "lr": 1e-3, "weight_decay": 0.0, "name": "check"}], stage)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        name = type(optimizer).__name__
        raise ConfigError(f"stage.optimizer: {name} does not step with dense gradients alone ({error})") from error


def gradient_norms(groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Norm of the gradients of each part, over all groups of `parameter_groups`, without waiting for the device.

    Of sharded gradients (DTensor) it is that of the whole, by one reduction for all parts: all ranks must call it.
    """
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        found.setdefault(group["name"].partition("/")[0], []).extend(gradients)
    sharded = [g for gradients in found.values() for g in gradients if is_sharded_tensor(g)]
    if not sharded:
        return {part: nn.utils.get_total_norm(gradients) for part, gradients in found.items()}
    mesh, dim = sharded[0].device_mesh, shard_dim(sharded[0])
    first = mesh.get_local_rank(dim) == 0  # counts what all ranks have whole
    own = [[_local(g) for g in gradients if first or is_sharded_tensor(g)] for gradients in found.values()]
    squares = torch.stack([nn.utils.get_total_norm(some).to(sharded[0].device) for some in own]).square()
    dist.all_reduce(squares, group=mesh.get_group(dim))
    return dict(zip(found, squares.sqrt().unbind(), strict=True))


def clip_gradients(parameters: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients, of sharded ones what this rank has, so that their `norm` is at most `limit`."""
    nn.utils.clip_grads_with_norm_(_stand_ins(parameters), limit, norm)


def clip_gradient_values(parameters: Iterable[Tensor], limit: float) -> None:
    """Limit each value of the gradients, of sharded ones what this rank has, to [-limit, limit]."""
    nn.utils.clip_grad_value_(_stand_ins(parameters), limit)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stand_ins(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Tensors whose `grad` is what this rank has of each gradient, in the same memory; DTensors are slow."""
    found = []
    for gradient in (_local(p.grad) for p in parameters if p.grad is not None):
        found.append(gradient.detach())
        found[-1].grad = gradient
    return found


def schedule_factor(stage: Stage, progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1] of the stage."""
    if progress < stage.warmup_share:
        return progress / stage.warmup_share
    if stage.schedule == "constant":
        return 1.0
    done = min((progress - stage.warmup_share) / (1 - stage.warmup_share), 1.0)
    decayed = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return stage.min_lr_share + (1 - stage.min_lr_share) * decayed


def step_schedule(stage: Stage, total_steps: int, elapsed_minutes: Callable[[], float]) -> Callable[[int], float]:
    """Factor by optimizer step, for `LambdaLR`.

    With `stage.max_minutes`, progress is that of steps or of time, whichever is further.
    """

    def factor(step: int) -> float:
        # Step s is taken with factor(s), so s + 1 keeps the first step of a warm-up from having a learning rate of 0.
        progress = (step + 1) / (total_steps + 1)
        if stage.max_minutes is not None:
            progress = max(progress, elapsed_minutes() / stage.max_minutes)
        return schedule_factor(stage, min(progress, 1.0))

    return factor
