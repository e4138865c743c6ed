"""Table of the parts of a model in a stage: parameters, trainable parameters, learning rate, weight decay."""

from torch import nn

from ..utils.text_table import text_table
from .lora import num_parameters
from .optim import parameter_groups
from .stage import PARTS, Stage

_HEADER = ("part", "parameters", "trainable", "lr", "weight decay")


def part_rows(model: nn.Module, stage: Stage) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of the table; the stage's freeze table must have been applied to the model."""
    groups = parameter_groups(model, stage)
    rows = []
    totals = [0, 0]
    for part, rate in stage.learning_rates.items():
        module, lora = getattr(model, PARTS[part]), stage.adapters.get(part)
        total = num_parameters(module)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        decays = sorted({group["weight_decay"] for group in groups if group["name"].startswith(part + "/")})
        decay = ", ".join(f"{d:g}" for d in decays) or "-"
        kind = "" if lora is None else f" ({'QLoRA' if lora.load_in_4bit else 'LoRA'} r={lora.r})"
        rows.append((part + kind, f"{total:,}", f"{trainable:,}", f"{rate:g}" if rate else "frozen", decay))
        totals = [totals[0] + total, totals[1] + trainable]
    rows.append(("all", f"{totals[0]:,}", f"{totals[1]:,}", "", ""))
    return rows


def part_table(model: nn.Module, stage: Stage) -> str:
    """Return the table as aligned text."""
    lines = text_table([_HEADER, *part_rows(model, stage)], numbers=True)
    limit = f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs} epochs"
    title = f"stage {stage.name}: objective {stage.objective}, {limit}, global batch {stage.global_batch_size}"
    return "\n".join([title, *lines])
