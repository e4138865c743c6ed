"""Model FLOPs of a training step, and peak FLOPs of devices, for MFU.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the work that the model requires, divided by the peak of
the device; padding and recomputed activations do not count. As in PaLM, an addition and a multiplication are two
operations, only matrix products and convolutions count, and attention counts L² pairs for L tokens.

PaLM's 6 operations per parameter and token do not hold with frozen parts and tiles: here each part runs on the meta
device, forward and backward with the stage's freeze table, under torch's `FlopCounterMode`.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models.configuration import AlignVLMConfig
from ..models.modeling import AlignVLMForConditionalGeneration, connector_features
from ..preprocessing.tiling import Tiling
from .lora import attach_adapters
from .optim import freeze
from .stage import Stage

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
"""Pattern of the device name -> peak in TFLOPs: dense bfloat16 with float32 accumulation, from the vendor's data sheet.
The first match counts. Lightning's `get_available_flops` does not recognise H200 by its device name and has numbers
with sparsity for some devices."""

_LENGTHS = (8, 16)  # Sequence lengths of the two runs of the LLM that separate linear from quadratic work


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of forward and backward.

    Attributes:
        vision: Vision tower, per tile.
        connector: Connector, per tile.
        llm: LLM without its head and without attention scores and sums, per token.
        attention: Attention scores and sums, per pair of tokens of a document (L tokens have L² pairs).
        head: LM head, per supervised position.
    """

    vision: float
    connector: float
    llm: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def by_part(self, *, tiles: float, tokens: float, pairs: float, supervised: float) -> dict[str, float]:
        """Return the FLOPs of batches, by part.

        `tiles` counts no tile of zeros of a batch without images, `tokens` no padding, `pairs` the pairs of tokens of
        each document (`count_pairs`), `supervised` the supervised positions.
        """
        return {
            "vision": tiles * self.vision,
            "connector": tiles * self.connector,
            "llm": tokens * self.llm + pairs * self.attention,
            "head": supervised * self.head,
        }

    def total(self, **amounts: float) -> float:
        return sum(self.by_part(**amounts).values())


_counted: dict[str, Work] = {}


def stage_work(config: AlignVLMConfig, stage: Stage) -> Work:
    """Count the FLOPs of training a model in a stage; it is built on the meta device for this, without memory.

    Equal stages, as the runs of a study are, are counted once in a process.
    """
    key = f"{config.to_json_string(use_diff=False)} {stage}"
    if key not in _counted:
        _counted[key] = count_work(meta_model(config, stage), objective=stage.objective)
    return _counted[key]


def meta_model(config: AlignVLMConfig, stage: Stage) -> AlignVLMForConditionalGeneration:
    """Build the model of a stage on the meta device: frozen by its table, with its adapters, none of them in 4 bit."""
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(copy.deepcopy(config))
        freeze(model, stage)
        # On the meta device as well: no random numbers are drawn for their weights.
        attach_adapters(model, {part: replace(lora, load_in_4bit=False) for part, lora in stage.adapters.items()})
    return model


def count_work(model: AlignVLMForConditionalGeneration, *, objective: str = "answer") -> Work:
    """Count the FLOPs of training a model on the meta device; objectives but `answer` do not run the LLM.

    Its attention and the connector's back-end are set to `eager`, which recomputes nothing.
    """
    for part in (model.vision_tower, model.language_model):
        part.set_attn_implementation("eager")
    if hasattr(model.connector, "backend"):
        model.connector.backend = "eager"
    vision, features = _count(lambda: encode(model, 1))
    table: Any = model.get_input_embeddings().weight
    if objective == "read":
        column = torch.tensor([model.connector.row_ids()[0]])
        connector, _ = _count(lambda: model.connector.log_probs(_leaf(features), column))
        return Work(vision=vision, connector=connector)
    connector, embeds = _count(lambda: model.connector(_leaf(features), table).embeds)
    if objective != "answer":
        return Work(vision=vision, connector=connector)
    trained = embeds.requires_grad or table.requires_grad
    few, many = _LENGTHS
    short, hidden = _count(lambda: decode(model, 1, few, trained))
    long, _ = _count(lambda: decode(model, 1, many, trained))
    attention = (long - short * many / few) / (many * many - few * many)
    position = torch.empty(1, hidden.shape[-1], device="meta", requires_grad=hidden.requires_grad)
    head, _ = _count(lambda: model.get_output_embeddings()(position))
    return Work(vision=vision, connector=connector, llm=short / few - few * attention, attention=attention, head=head)


def count_pairs(lengths: Sequence[int]) -> int:
    """Return the number of token pairs within documents of these lengths."""
    return sum(length * length for length in lengths)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPs per second of a device; None for a CPU and devices not in `PEAK_TFLOPS`."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """Return the peak FLOPs per second of the device of this name, or None; see `PEAK_TFLOPS`."""
    found = next((tflops for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, name)), None)
    return None if found is None else found * 1e12


def _count(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the FLOPs of a forward run, and backward if its result requires gradients; and the result."""
    # Math attention, whose products the counter sees on any device, each once.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
        if result.requires_grad:
            result.sum().backward()
    return float(counter.get_total_flops()), result


def _leaf(result: Tensor) -> Tensor:
    return result.detach().requires_grad_(result.requires_grad)


def encode(model: AlignVLMForConditionalGeneration, tiles: int) -> Tensor:
    """Run the vision tower on the meta device; return the features that the connector reads."""
    tiling = Tiling.from_dict(model.config.tiling)
    pixels = torch.empty(tiles, 3, tiling.tile_height, tiling.tile_width, device="meta")
    return connector_features(model.vision_tower, pixels, model.config)


def decode(model: AlignVLMForConditionalGeneration, rows: int, length: int, trained: bool) -> Tensor:
    """Run the LLM without its head on the meta device, on rows of `length` tokens: (rows, length, D)."""
    table: Any = model.get_input_embeddings().weight
    embeds = torch.empty(rows, length, table.shape[1], dtype=table.dtype, device="meta", requires_grad=trained)
    # A 4D mask, because transformers' own mask reads values, which meta tensors do not have.
    mask = torch.empty(rows, 1, length, length, device="meta")
    decoder = model.language_model.get_decoder()
    return decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
