"""Memory of a training step on one GPU, counted by part from shapes alone; what `activation_checkpointing: auto` takes.

The model runs forward once on the meta device, on the largest micro batch of a stage, under CUDA's autocast rules; what
autograd keeps is counted by `saved_tensors_hooks`. Attention counts as a flash kernel, which keeps its inputs, output
and a number a row. The rest follows from the parameters, and from the assumptions that are constants below.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..models.configuration import AlignVLMConfig
from ..models.counted_attention import COUNTED
from ..models.modeling import AlignVLMForConditionalGeneration
from ..ops.chunked import gpu_budget
from ..ops.linear_cross_entropy import CHUNK_LOGITS_CUDA
from ..preprocessing.tiling import Tiling
from ..strategies.fsdp import ShardedStrategy
from ..strategies.sharding import layers
from ..utils.text_table import text_table
from .acceleration import CHECKPOINTED
from .flops import decode, encode, meta_model
from .stage import PARTS, Stage

CARD = round(79.1 * 2**30)  # Bytes that a card of 80 GB has for a process
CONTEXT = 2 * 2**30  # Assumed bytes of CUDA's context, of the libraries' workspaces and of NCCL
USABLE = 0.92
"""Share of a card that a step may take by this count: the allocator leaves fragments, and no GPU has confirmed it."""
CHOICES: tuple[tuple[str, ...], ...] = ((), ("vision",), ("llm",), ("vision", "llm"))
"""Parts whose layers may run again in backward, by rising cost."""
_COLUMNS = ("state", "gathered", "activations", "workspace")
_LOW = frozenset(
    (F.linear, F.conv1d, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm)
)
_FULL = frozenset((F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax))
"""Functions that CUDA's autocast runs in half precision, and in float32."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sizes of a micro batch on a device: text and visual `tokens` of a row; `tiles` and `supervised` tokens of all."""

    rows: int
    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the model lies on the devices.

    Attributes:
        shards: Devices that parameters, gradients and optimizer state are sharded over (FSDP2); 1: each has all.
        buckets: Whether DDP's buckets hold a second copy of the gradients (counted for every DDP).
        whole_gradients: Whether sharded ranks keep whole gradients in float32 until the end of a step.
        gathered: Parts whose layers stay gathered from forward to backward.
        mixed: Whether the precision is `bf16-mixed`; else all is in float32.
    """

    shards: int = 1
    buckets: bool = False
    whole_gradients: bool = False
    gathered: tuple[str, ...] = ()
    mixed: bool = True

    @classmethod
    def from_strategy(cls, strategy: Strategy) -> "Spread":
        mixed = str(strategy.precision_plugin.precision) == "bf16-mixed"
        if not isinstance(strategy, ShardedStrategy):
            return cls(buckets=isinstance(strategy, DDPStrategy), mixed=mixed)
        return cls(
            shards=strategy.num_processes if strategy.shard_within_node else strategy.world_size,
            whole_gradients=not strategy.sync_every_micro_batch,
            gathered=tuple(part for part in CHECKPOINTED if not getattr(strategy, f"reshard_{part}")),
            mixed=mixed,
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that autograd keeps of one part.

    Attributes:
        inner: In the part's layers, whose inputs have `inputs`.
        largest: In the layer that keeps most.
        rest: Outside of the layers.
    """

    inner: int = 0
    inputs: int = 0
    largest: int = 0
    rest: int = 0

    def bytes(self, *, checkpointed: bool) -> int:
        return self.rest + (self.inputs + self.largest if checkpointed else self.inner)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a step by part: `fixed` has `state`, `gathered` and `workspace` in bytes, `kept` what autograd has."""

    fixed: Mapping[str, Mapping[str, int]]
    kept: Mapping[str, Kept]

    def rows(self, checkpointed: Sequence[str] = ()) -> dict[str, dict[str, int]]:
        """Return part -> column -> bytes, where the layers of the parts `checkpointed` run again in backward."""
        kept = {part: {"activations": one.bytes(checkpointed=part in checkpointed)} for part, one in self.kept.items()}
        return {part: {**dict.fromkeys(_COLUMNS, 0), **self.fixed[part], **kept.get(part, {})} for part in self.fixed}

    def total(self, checkpointed: Sequence[str] = ()) -> int:
        return sum(sum(row.values()) for row in self.rows(checkpointed).values())

    def fits(self, checkpointed: Sequence[str] = (), *, card: int = CARD) -> bool:
        return self.total(checkpointed) <= USABLE * card

    def choose(self, *, card: int = CARD) -> tuple[str, ...]:
        return next((parts for parts in CHOICES if self.fits(parts, card=card)), CHOICES[-1])

    def verdict(self, checkpointed: Sequence[str] = (), *, card: int = CARD) -> str:
        total, usable = self.total(checkpointed), USABLE * card
        known = f"{_gib(total)} GiB of {_gib(usable)} usable ({_gib(card)} less {1 - USABLE:.0%})"
        if total <= usable:
            return f"fits: {known}"
        return f"does NOT fit, by {_gib(total - usable)} GiB: {known}"

    def explain(self, chosen: Sequence[str], *, card: int = CARD) -> str:
        parts = f"[{', '.join(chosen)}]" if chosen else "no part"
        line = f"model.activation_checkpointing: auto takes {parts}; a step {self.verdict(chosen, card=card)}"
        if chosen:
            line += f"; without it {_gib(self.total())} GiB"
        if not self.fits(chosen, card=card):
            line += ". Lower data.init_args.batch_size, or shard the model over more GPUs"
        return line

    def table(self, checkpointed: Sequence[str] = ()) -> str:
        rows = self.rows(checkpointed)
        body = [
            (part, *(_gib(row[column]) for column in _COLUMNS), _gib(sum(row.values()))) for part, row in rows.items()
        ]
        sums = [_gib(sum(row[column] for row in rows.values())) for column in _COLUMNS]
        header = ("GiB", *_COLUMNS, "all")
        return "\n".join(text_table([header, *body, ("all", *sums, _gib(self.total(checkpointed)))], numbers=True))


def largest_micro_batch(
    config: AlignVLMConfig, *, batch_size: int, max_text_length: int, token_budget: int | None = None
) -> MicroBatch:
    """Return the largest micro batch of samples of one image each, whose tiles the model's tiling bounds.

    `batch_size` counts samples, or rows of `token_budget` tokens if they are packed; `max_text_length` is in tokens.
    """
    tiling, per_tile = Tiling.from_dict(config.tiling), config.tokens_per_tile
    tiles = tiling.max_tiles + int(tiling.max_tiles > 1 and tiling.thumbnail != "none")
    tokens = tiles * per_tile + max_text_length
    if token_budget is not None:
        tokens = max(tokens, token_budget)
        tiles = max(tiles, (tokens - 1) // per_tile)
    return MicroBatch(
        rows=batch_size, tokens=tokens, tiles=batch_size * tiles, supervised=batch_size * (tokens - tiles * per_tile)
    )


def step_memory(
    model: AlignVLMForConditionalGeneration,
    stage: Stage,
    batch: MicroBatch,
    spread: Spread | None = None,
    *,
    card: int = CARD,
) -> StepMemory:
    """Count the memory of a step on one device of `card` bytes; `model`, of `flops.meta_model`, is changed in place."""
    spread = spread or Spread()
    fixed = {part: _fixed(model, stage, part, spread, card) for part in PARTS}
    kept = kept_by_part(model, batch, objective=stage.objective, spread=spread)
    for part, one in kept.items():  # gradients of what a layer computes, and a layer that runs again in backward
        fixed[part]["workspace"] += one.largest
    return StepMemory(fixed={**fixed, "context": {"workspace": CONTEXT}}, kept=kept)


def choose_checkpointing(trainer: pl.Trainer, config: AlignVLMConfig, stage: Stage) -> tuple[str, ...]:
    """Return the parts whose layers must run again in backward for the largest micro batch to fit, and log why.

    None on a device that is no GPU. The first rank counts, so that all take the same; all ranks must call it.
    """
    strategy = trainer.strategy
    card = card_bytes(strategy.root_device)
    if card is None:
        return ()
    chosen: tuple[str, ...] = ()
    if trainer.is_global_zero:
        data = getattr(trainer, "datamodule", None)
        batch = largest_micro_batch(
            config,
            batch_size=getattr(data, "batch_size", 1),
            max_text_length=getattr(data, "max_text_length", None) or stage.max_text_length,
            token_budget=getattr(data, "token_budget", None),
        )
        try:
            memory = step_memory(meta_model(config, stage), stage, batch, Spread.from_strategy(strategy), card=card)
            chosen = memory.choose(card=card)
            rank_zero_info(memory.explain(chosen, card=card))
        except Exception as error:  # of a custom part; the other ranks wait for what is taken
            chosen = CHOICES[-1]
            rank_zero_warn(uncounted(error) + f"; activation_checkpointing takes {list(chosen)}, or the list you set")
    return strategy.broadcast(chosen)


def uncounted(error: Exception) -> str:
    """Return the message about a model whose forward does not run on the meta device."""
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"the memory of a step cannot be counted ({type(error).__name__}: {reason[:200]})"


def card_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU; None for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def kept_by_part(
    model: AlignVLMForConditionalGeneration,
    batch: MicroBatch,
    *,
    objective: str = "answer",
    spread: Spread | None = None,
) -> dict[str, Kept]:
    """Count what autograd keeps for a micro batch of a stage with this objective, without activation checkpointing.

    The model is on the meta device; its attention is changed, and its dtype where parameters are gathered in bfloat16.
    """
    spread = spread or Spread()
    if spread.mixed and spread.shards > 1:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    for part in (model.vision_tower, model.language_model):
        part.set_attn_implementation(COUNTED)
    found = dict.fromkeys(PARTS, Kept())
    table: Any = model.get_input_embeddings().weight
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        if spread.mixed:
            stack.enter_context(_Autocast())
        found["vision"], features = _count(lambda: encode(model, batch.tiles), model.vision_tower, model)
        if objective == "read":
            columns = model.connector.row_ids()[:1]  # plain numbers: those of a meta tensor cannot be read
            found["connector"], _ = _count(lambda: model.connector.log_probs(features, columns), model.connector, model)
            return found
        found["connector"], embeds = _count(
            lambda: model.connector(features, table).embeds, model.connector, model, has_layers=False
        )
        if objective != "answer":
            return found
        trained = embeds.requires_grad or table.requires_grad
        found["llm"], hidden = _count(
            lambda: decode(model, batch.rows, batch.tokens, trained), model.language_model.get_decoder(), model
        )
    if hidden.requires_grad:  # the loss keeps the hidden states of supervised tokens
        loss = batch.supervised * hidden.shape[-1] * hidden.element_size()
        found["llm"] = replace(found["llm"], rest=found["llm"].rest + loss)
    return found


def _fixed(
    model: AlignVLMForConditionalGeneration, stage: Stage, part: str, spread: Spread, card: int
) -> dict[str, int]:
    """Bytes of a part that do not depend on the micro batch, by column."""
    module = getattr(model, PARTS[part])
    total, trained = _numbers(module)
    averaged = 4 * total if stage.ema_decay else 0
    state = (4 * total + 12 * trained + averaged) // spread.shards  # weights; gradients and two moments
    if spread.buckets or spread.whole_gradients:
        state += 4 * trained
    found = {"state": state, "gathered": 0, "workspace": 0}
    if hasattr(module, "budget"):  # ALIGN: arrays of scores, and copies of W2 and E_text in bfloat16
        copies = 2 * 2 * module.w2.weight.numel() if spread.mixed and spread.shards == 1 else 0
        found["workspace"] = (module.budget or gpu_budget(card)) + copies
    table: Any = model.get_input_embeddings().weight
    if part == "llm" and stage.objective == "answer":
        found["workspace"] = 3 * 4 * CHUNK_LOGITS_CUDA
        if table.requires_grad and spread.shards == 1:
            found["workspace"] += 2 * 4 * table.numel()  # gradients of head and table before they are added up
    if spread.shards > 1:
        width, inner = 2 if spread.mixed else 4, layers(module)
        sizes = [_numbers(layer) for layer in inner]
        largest, trained_layer = max(sizes, default=(0, 0))
        rest, trained_rest = total - sum(n for n, _ in sizes), trained - sum(n for _, n in sizes)
        # The layer that runs and the one that is gathered ahead; their gradients, and a sum in float32.
        held = sum(n for n, _ in sizes) if part in spread.gathered else 2 * largest
        found["gathered"] = width * (rest + held + trained_rest + trained_layer)
        found["workspace"] += 4 * max(trained_rest, trained_layer)
    return found


def _numbers(module: nn.Module) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


class _Autocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16, which torch does not apply to meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = torch.bfloat16 if func in _LOW else torch.float32 if func in _FULL else None
        if dtype is None:
            return func(*args, **(kwargs or {}))

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return func(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})


def _count(
    run: Callable[[], Tensor], part: nn.Module, model: nn.Module, *, has_layers: bool = True
) -> tuple[Kept, Tensor]:
    """Run a part; return what autograd keeps of it beside parameters, and its result."""
    seen = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    bytes_of: dict[int | None, int] = {None: 0}
    current: list[int | None] = [None]
    inputs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in seen:
            seen.add(key)
            bytes_of[current[0]] = bytes_of.get(current[0], 0) + storage.nbytes()
        return tensor

    def begin(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            current[0] = number
            states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            inputs.append(states.numel() * states.element_size())

        return hook

    def end(*_: Any) -> None:
        current[0] = None

    with ExitStack() as stack:
        for number, layer in enumerate(layers(part) if has_layers else []):
            stack.callback(layer.register_forward_pre_hook(begin(number), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(end).remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        result = run()
    rest, sizes = bytes_of.pop(None), bytes_of.values()
    largest = max(sizes, default=0)
    return Kept(inner=sum(sizes), inputs=sum(inputs) if largest else 0, largest=largest, rest=rest), result


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
