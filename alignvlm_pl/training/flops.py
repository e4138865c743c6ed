"""Floating-point operations that a training step needs, and what the device could do: MFU.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the work that the model needs, over the peak of the
device, whatever is computed besides: padding, recomputed activations, chunks that are computed twice count nothing.
Here as there an addition and a multiplication are two operations, only matrix products and convolutions count, and
attention counts in full, L² pairs for L tokens, though a causal kernel may leave half of them out.

PaLM takes 6 operations a parameter and token: 2 forward, 2 for the gradient of the input, 2 for that of the weight.
With frozen parts that is wrong by up to a factor of 3, and a page's tiles are no tokens. So the products are counted:
each part runs once on the meta device, one tile or a few tokens, forward and backward as the freeze table has it, under
torch's own counter. A frozen matrix has no gradient of its own, and nothing below the lowest trained part has any.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models.modeling import AlignVLMForConditionalGeneration, connector_features
from ..preprocessing.tiling import Tiling

PEAK_TFLOPS = {
    r"\bB200\b": 2250.0,
    r"\bH200 NVL\b": 835.0,
    r"\bG?H200\b": 989.0,
    r"\bH100 NVL\b": 835.0,
    r"\bH100 PCIe\b": 756.0,
    r"\bH100\b": 989.0,
    r"\bA100\b": 312.0,
    r"\bL40S\b": 362.0,
    r"\bL4\b": 121.0,
    r"\bA10\b": 125.0,
    r"\bRTX 4090\b": 165.2,
    r"\bMI300X\b": 1307.0,
}
"""Pattern of a device's name -> peak in 10¹² operations a second: dense bfloat16 with float32 sums, by its maker's data
sheet. The first that matches counts."""

_LENGTHS = (8, 16)
"""Tokens of the two runs of the LLM, which tell what grows with the tokens from what grows with their square."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of forward and backward.

    Attributes:
        vision: Of the vision tower, for one tile.
        connector: Of the connector, for one tile.
        llm: Of the LLM without its head, for one token, attention's scores and sums left out.
        attention: Of these, for one pair of tokens of a document: L tokens have L² pairs.
        head: Of the LM head, for one supervised position.
    """

    vision: float
    connector: float
    llm: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def by_part(self, *, tiles: float, tokens: float, pairs: float, supervised: float) -> dict[str, float]:
        """Operations of some batches, by part.

        Args:
            tiles: Real tiles: the one of zeros that stands in for none does not count.
            tokens: Positions that are not padding, text and visual.
            pairs: Sum of the squares of the documents' tokens.
            supervised: Positions with a loss.
        """
        return {
            "vision": tiles * self.vision,
            "connector": tiles * self.connector,
            "llm": tokens * self.llm + pairs * self.attention,
            "head": supervised * self.head,
        }

    def total(self, *, tiles: float, tokens: float, pairs: float, supervised: float) -> float:
        """Operations of some batches; see `by_part`."""
        return sum(self.by_part(tiles=tiles, tokens=tokens, pairs=pairs, supervised=supervised).values())


def work_of(model: AlignVLMForConditionalGeneration, *, objective: str) -> Callable[[], Work]:
    """Take the structure of a model as it is now; the call that is returned counts its work.

    CONTRACT: called before a strategy shards the model, which can then no longer be copied (`module.configure_model`).
    Whatever goes wrong is raised by the call, whose caller can do without (callbacks.throughput).
    """
    try:
        structure = skeleton(model)
    except Exception as error:
        return partial(_fail, error)
    return lambda: count_work(structure, objective=objective)


def skeleton(model: AlignVLMForConditionalGeneration) -> AlignVLMForConditionalGeneration:
    """The model on the meta device: structure, shapes and freeze table, and no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def count_work(model: AlignVLMForConditionalGeneration, *, objective: str = "answer") -> Work:
    """Count the operations that training needs.

    Args:
        model: Of `skeleton`; its attention and the connector's back-end are set to their plain forms, which compute
            nothing twice.
        objective: Of the stage: `read` runs neither the LLM nor its head.
    """
    for part in (model.vision_tower, model.language_model):
        part.set_attn_implementation("eager")
    if hasattr(model.connector, "backend"):
        model.connector.backend = "eager"
    tiling = Tiling.from_dict(model.config.tiling)
    pixels = torch.empty(1, 3, tiling.tile_height, tiling.tile_width, device="meta")
    vision, features = _count(lambda: connector_features(model.vision_tower, pixels, model.config))
    table: Any = model.get_input_embeddings().weight
    if objective == "read":
        column = torch.tensor([model.connector.row_ids()[0]])
        connector, _ = _count(lambda: model.connector.log_probs(_leaf(features), column))
        return Work(vision=vision, connector=connector)
    connector, embeds = _count(lambda: model.connector(_leaf(features), table).embeds)
    trained = embeds.requires_grad or table.requires_grad
    few, many = _LENGTHS
    short, hidden = _count(lambda: _decode(model, few, trained))
    long, _ = _count(lambda: _decode(model, many, trained))
    attention = (long - short * many / few) / (many * many - few * many)
    position = torch.empty(1, hidden.shape[-1], device="meta", requires_grad=hidden.requires_grad)
    head, _ = _count(lambda: model.get_output_embeddings()(position))
    return Work(
        vision=vision, connector=connector, llm=short / few - few * attention, attention=attention, head=head
    )


def pairs_of(lengths: Sequence[int]) -> int:
    """Pairs of tokens that attend to each other, in documents of these lengths."""
    return sum(length * length for length in lengths)


def peak_flops(device: torch.device) -> float | None:
    """Peak of a device in operations a second; None for a CPU and what `PEAK_TFLOPS` does not know."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Peak of the device of this name; see `PEAK_TFLOPS`."""
    found = next((tflops for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, name)), None)
    return None if found is None else found * 1e12


def _count(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Operations of a run forward, and backward if anything in it has a gradient; and its result."""
    # The plain form of attention, whose products the counter sees on any device, each of them once.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
        if result.requires_grad:
            result.sum().backward()
    return float(counter.get_total_flops()), result


def _fail(error: Exception) -> Work:
    raise error


def _leaf(result: Tensor) -> Tensor:
    return result.detach().requires_grad_(result.requires_grad)


def _decode(model: AlignVLMForConditionalGeneration, length: int, trained: bool) -> Tensor:
    """Run the LLM without its head on one document."""
    table: Any = model.get_input_embeddings().weight
    embeds = torch.empty(1, length, table.shape[1], device="meta", requires_grad=trained)
    # A whole mask, because the one that transformers makes looks at values, which nothing on this device has.
    mask = torch.empty(1, 1, length, length, device="meta")
    decoder = model.language_model.get_decoder()
    hidden: Tensor = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden
