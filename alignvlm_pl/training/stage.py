"""A stage: what trains, at which learning rate, for how long, and on which objective. Paper: appendix A.1, table 6."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import ConfigError, nearest, require_known
from .lora_config import Lora, check_blocks, parse_adapters

PARTS = {"vision": "vision_tower", "connector": "connector", "llm": "language_model"}
"""Name of a part in configs, logs and tables -> its attribute of the model."""

BLOCK_PARTS = ("vision", "llm")
"""Parts that are stacks of blocks."""

OBJECTIVES = ("answer", "read", "patch")
SCHEDULES = ("cosine", "linear", "constant")
_CLASS = {"class_path", "init_args"}
_RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("global_batch_size", "max_text_length", "epochs"), lambda value: value >= 1, ": expected at least 1"),
    (("max_steps",), lambda value: value is None or value >= 1, ": expected at least 1, or null"),
    (
        ("max_minutes", "gradient_clip_norm"),
        lambda value: value is None or value > 0,
        ": expected more than 0, or null",
    ),
    (("weight_decay", "readout_weight"), lambda value: 0 <= value <= 1000, ": expected 0 to 1000"),
    (("warmup_share", "adam_beta2"), lambda value: 0 <= value < 1, ": expected a share in [0, 1)"),
    (("min_lr_share",), lambda value: 0 <= value <= 1, ": expected a share in [0, 1]"),
    (("ema_decay",), lambda value: value is None or 0 < value < 1, ": expected a share in (0, 1), or null"),
    (
        ("lr_vision", "lr_connector", "lr_llm"),
        lambda value: value is None or value >= 0,
        ": expected a positive learning rate, or null",
    ),
)
"""Settings, the check of their values, and the end of the error's text."""
TARGET_ENTROPY = "target_entropy"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage.

    Args:
        name: Name in logs, run folders and exports.
        objective: `answer` (next-token loss on answers, paper), `read` (CTC on P_vocab: the read warm start), or
            `patch` (cosine of visual tokens and the text embeddings of what they cover, for any connector).
        lr_vision: Learning rate of the vision tower; null freezes it.
        lr_connector: Learning rate of the connector; null freezes it.
        lr_llm: Learning rate of the LLM; null freezes it.
        readout_weight: Weight of a character that is read out against a supervised token of the answer loss (needs
            `lines` in the samples). Both are summed and divided by the supervised tokens of the step.
        global_batch_size: Samples per optimizer step over all devices; accumulation follows from it.
        max_text_length: Text tokens a sample may have; visual tokens never count.
        max_steps: Optimizer steps; null: `epochs` decides.
        epochs: Passes over the data, if `max_steps` is null.
        max_minutes: Wall time after which the stage ends early, its schedule fully run down; null: none.
        schedule: Decay after warm-up. The paper gives none: cosine is our choice.
        warmup_share: Share of the stage spent in linear warm-up (our choice: 0.03).
        min_lr_share: Learning rate at the end as a share of the peak; not with a constant schedule.
        weight_decay: Decay of matrices; norms, biases and embeddings have none.
        optimizer: Another optimizer than AdamW, `{class_path: torch.optim.SGD, init_args: {momentum: 0.9}}`. It is
            given the parameter groups of the stage, with their `lr` and `weight_decay`. null: AdamW.
        adam_beta2: Decay of AdamW's mean square; a short stage forgets its large first gradients sooner with 0.95.
        gradient_clip_norm: Largest norm of the gradient; null: no clipping.
        calibrate: `{target_entropy: 3.0}` multiplies the gain of ALIGN's vocabulary norm, before the first step of a
            fresh stage, so that P_vocab has this mean entropy in nats on the first batch; null: the gain stays. The
            entropy of n equal weights is ln n: 3.0 is as sharp as 20 tokens.
        lora: Adapters trained in place of a part, at its learning rate, such as `{llm: {r: 16, alpha: 32}}` (fields:
            `alignvlm_pl.training.lora_config.Lora`); the part's own weights stay as they are. null: parts
            train themselves.
        last_blocks: Blocks of a part that train, counted from its last, such as `{llm: 15}`; what comes before them,
            embeddings and LM head stay as they are. null: all train.
        ema_decay: Decay per optimizer step of an exponential moving average of the weights, such as 0.999. Validation
            and the export use the average; null: the weights themselves.
        parent: Name of the stage whose weights this one starts from, checked against `init_from`; null: any, or none.
        init_from: Folder written at the end of the parent stage; null: start from the pretrained parts.
    """

    name: str
    objective: str = "answer"
    lr_vision: float | None = None
    lr_connector: float | None = None
    lr_llm: float | None = None
    readout_weight: float = 0.0
    global_batch_size: int = 8
    max_text_length: int = 2048
    max_steps: int | None = None
    epochs: int = 1
    max_minutes: float | None = None
    schedule: str = "cosine"
    warmup_share: float = 0.03
    min_lr_share: float = 0.0
    weight_decay: float = 0.0
    optimizer: dict[str, Any] | None = None
    adam_beta2: float = 0.999
    gradient_clip_norm: float | None = 1.0
    calibrate: dict[str, float] | None = None
    lora: dict[str, dict[str, Any]] | None = None
    last_blocks: dict[str, int] | None = None
    ema_decay: float | None = None
    parent: str | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        require_known(self.objective, OBJECTIVES, f"stage.objective={self.objective!r}")
        require_known(self.schedule, SCHEDULES, f"stage.schedule={self.schedule!r}")
        if not any(self.learning_rates.values()):
            raise ConfigError(f"stage {self.name!r} trains nothing: set lr_vision, lr_connector or lr_llm")
        if self.objective != "answer" and self.lr_llm:
            raise ConfigError(
                f"stage {self.name!r}: objective {self.objective!r} does not run the LLM; set lr_llm to null"
            )
        for names, valid, expected in _RANGES:
            for name in names:
                if not _holds(valid, value := getattr(self, name)):
                    raise ConfigError(f"stage.{name}={value}{expected}")
        if self.optimizer is not None:
            if not isinstance(self.optimizer.get("class_path"), str) or self.optimizer.keys() - _CLASS:
                raise ConfigError(
                    f"stage.optimizer={self.optimizer}: expected {{class_path: torch.optim.SGD, init_args: {{…}}}}"
                )
            if self.adam_beta2 != Stage.adam_beta2:
                raise ConfigError("stage.adam_beta2 is AdamW's; set betas in stage.optimizer.init_args")
        if self.calibrate is not None:
            _check_calibration(self.calibrate)
            if not self.lr_connector:
                raise ConfigError(
                    f"stage {self.name!r}: calibrate sets the connector's gain, but the stage freezes the connector; "
                    "set lr_connector, or calibrate to null"
                )
        for part, count in (self.last_blocks or {}).items():
            self._check_last_blocks(part, count)
        for part, lora in self.adapters.items():
            if not self.learning_rates[part]:
                lr = self.learning_rates[part]
                raise ConfigError(f"stage.lora.{part} needs stage.lr_{part}, the adapter's learning rate; it is {lr}")
            if lora.load_in_4bit and self.ema_decay is not None:
                raise ConfigError(
                    f"stage.ema_decay cannot average the 4-bit weights of stage.lora.{part}.load_in_4bit; set one of "
                    "them to null"
                )

    def _check_last_blocks(self, part: str, count: int) -> None:
        where = f"stage.last_blocks.{part}"
        require_known(part, BLOCK_PARTS, f"{where}: this part has no blocks")
        check_blocks(where, count)
        if not self.learning_rates[part]:
            raise ConfigError(f"{where} needs stage.lr_{part}, the learning rate of the blocks")
        if part in self.adapters:
            raise ConfigError(f"{where} and stage.lora.{part} exclude each other: set stage.lora.{part}.last_blocks")

    @property
    def learning_rates(self) -> dict[str, float | None]:
        """Learning rate of each part; None or 0 means frozen."""
        return {"vision": self.lr_vision, "connector": self.lr_connector, "llm": self.lr_llm}

    @property
    def adapters(self) -> dict[str, Lora]:
        return parse_adapters(self.lora)


def _holds(valid: Callable[[Any], bool], value: Any) -> bool:
    """Whether a setting is a finite number, or null where it may be, and in its range."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    try:
        return (number or value is None) and valid(value)
    except TypeError:  # null where a number is needed
        return False


def _check_calibration(settings: dict[str, float]) -> None:
    for key in settings:
        if key != TARGET_ENTROPY:
            raise ConfigError(f"stage.calibrate has no setting {key!r}; {nearest(key, (TARGET_ENTROPY,))}")
    target = settings.get(TARGET_ENTROPY)
    if target is None or not target > 0:
        raise ConfigError(
            f"stage.calibrate.{TARGET_ENTROPY}={target}: expected nats above 0 and below ln of ALIGN's rows, or "
            "calibrate: null"
        )


def accumulation(global_batch_size: int, batch_size: int, num_devices: int) -> int:
    """Micro batches per optimizer step; a ConfigError names valid global batch sizes if there is none."""
    per_step = batch_size * num_devices
    if global_batch_size % per_step:
        below = max(global_batch_size // per_step, 1) * per_step
        raise ConfigError(
            f"stage.global_batch_size={global_batch_size} is not a multiple of data batch_size {batch_size} x "
            f"{num_devices} devices = {per_step}; nearest valid values: {below}, {below + per_step}"
        )
    return global_batch_size // per_step


def steps_of_epochs(epochs: int, *, micro_batches: int, accumulated: int, limit: int | float | None = None) -> int:
    """Optimizer steps of passes over `micro_batches` on each rank; the last step of a pass may have fewer.

    `limit` is `trainer.limit_train_batches`: a number of micro batches, or a share of them as a float; None: all.
    """
    if isinstance(limit, float):
        micro_batches = int(micro_batches * limit)
    elif limit is not None:
        micro_batches = min(micro_batches, limit)
    return epochs * -(-micro_batches // accumulated)


def require_parent(name: str, *, parent: str | None, init_from: str | None) -> None:
    """Raise a ConfigError for a stage that names a parent, and has no `init_from`."""
    if parent is not None and init_from is None:
        raise ConfigError(
            f"stage {name!r} starts from the end of stage {parent!r}, but stage.init_from is null: set it to the hf "
            f"folder in the run folder of stage {parent!r}, or stage.parent to null to start from the pretrained parts"
        )
