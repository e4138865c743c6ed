"""Settings of LoRA adapters (Hu et al. 2021) and QLoRA (Dettmers et al. 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, require_known

ALL_LINEAR = "all-linear"
LORA_PARTS = ("vision", "llm")  # Parts that can have an adapter; the connector is small and trained directly


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapter of one part: every target W (out, in) becomes W + alpha / r · B A; only A (r, in) and B (out, r) train.

    Args:
        r: Rank.
        alpha: Scale of the update, alpha / r.
        dropout: Dropout of the adapter's input in training.
        target_modules: Names of the linear layers, such as `[q_proj, v_proj]`; `all-linear`: all but the LM head.
        last_blocks: Blocks that have an adapter, counted from the part's last; null: all.
        load_in_4bit: Store the frozen linear layers in NF4 with double quantization (QLoRA; needs CUDA and
            bitsandbytes).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    last_blocks: int | None = None
    load_in_4bit: bool = False


def parse_adapters(settings: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Lora]:
    """Parse a `stage.lora` setting, part -> adapter; a ConfigError for one that is unknown or out of range."""
    return {part: _parse(part, values) for part, values in (settings or {}).items()}


def _parse(part: str, values: Mapping[str, Any]) -> Lora:
    where = f"stage.lora.{part}"
    require_known(part, LORA_PARTS, f"{where}: this part takes no adapter")
    known = [field.name for field in fields(Lora)]
    for key in values or {}:
        require_known(key, known, f"{where} has no setting {key!r}")
    lora = Lora(**(values or {}))
    if isinstance(lora.r, bool) or not isinstance(lora.r, int) or lora.r < 1:
        raise ConfigError(f"{where}.r={lora.r!r}: expected a whole number of at least 1")
    if not isinstance(lora.alpha, (int, float)) or not lora.alpha > 0:
        raise ConfigError(f"{where}.alpha={lora.alpha!r}: expected a number above 0")
    if not isinstance(lora.dropout, (int, float)) or not 0 <= lora.dropout < 1:
        raise ConfigError(f"{where}.dropout={lora.dropout!r}: expected a share in [0, 1)")
    check_blocks(f"{where}.last_blocks", lora.last_blocks)
    names = lora.target_modules
    if names != ALL_LINEAR and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise ConfigError(f"{where}.target_modules={names!r}: expected a list of layer names, or {ALL_LINEAR}")
    return lora


def check_blocks(setting: str, count: Any) -> None:
    """Raise a ConfigError if a number of blocks is none; null is all."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"{setting}={count!r}: expected a whole number of at least 1, or null")
