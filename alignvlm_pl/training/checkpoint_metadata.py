"""What a checkpoint and an export say about themselves, and what is refused because of it."""

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..models.build import ModelSpec
from ..models.configuration import AlignVLMConfig
from ..models.connectors import connector_identity
from ..models.processing import AlignVLMProcessor
from ..utils.version import __version__
from .lora_config import Lora, parse_adapters
from .stage import Stage

CONTENTS = "contents"  # Key of a checkpoint

_VERSION = 1
_LIBRARIES = (
    *("torch", "lightning", "transformers", "tokenizers", "numpy", "pillow"),
    *("peft", "bitsandbytes", "liger_kernel", "triton", "flash_attn"),  # extras
)
_KEPT_BY_OPTIMIZER = ("lr_vision", "lr_connector", "lr_llm", "last_blocks", "weight_decay", "adam_beta2", "optimizer")
"""Settings of a stage that a resumed optimizer brings back, whatever the configuration says now."""


def contract(spec: ModelSpec, processor: AlignVLMProcessor) -> dict[str, Any]:
    """Return what weights are trained with and must be used with: processor, vision feature, connector."""
    own = {"vision_feature": spec.vision_feature, "connector": connector_identity(spec.connector)}
    return json.loads(json.dumps({**processor.identity(), **own}))


def build_metadata(
    *,
    config: AlignVLMConfig,
    contract: dict[str, Any],
    stage: Stage,
    parent: dict[str, str] | None,
    samples_seen: dict[str, int],
) -> dict[str, Any]:
    """Return the description of a checkpoint, in plain types, with the versions of the libraries.

    `parent` has `stage` and `weights_sha256` of the start; `samples_seen` counts the stage's samples by source.
    """
    return {
        "version": _VERSION,
        "model": json.loads(config.to_json_string(use_diff=False)),
        "processor": contract,
        "stage": asdict(stage),
        "parent": parent,
        "samples_seen": samples_seen,
        "versions": {"alignvlm_pl": __version__, "python": platform.python_version(), **dict(_installed())},
    }


def check_contract(found: Mapping[str, Any], expected: Mapping[str, Any], *, source: str) -> None:
    """Raise a CheckpointError for weights of another contract, with `source`, a setting or folder, and both values."""
    if differences := list(_differences(_completed(found), _completed(expected))):
        listing = "; ".join(f"{key} {old}, the model has {new}" for key, old, new in differences)
        raise CheckpointError(f"{source} was trained with {listing}. Use the model file that it was trained with")


def check_stage(found: Mapping[str, Any], stage: Stage) -> None:
    """Compare the settings of a checkpoint's stage, `found`, with the configured ones.

    Raises:
        CheckpointError: One of them has adapters or averaged weights, which the other has not.
        ConfigError: The samples of a step differ, or settings that the checkpoint's optimizer would bring back; with
            both values of each.
    """
    before = {"global_batch_size": stage.global_batch_size, **found, "lora": _plain(parse_adapters(found.get("lora")))}
    now = {**asdict(stage), "lora": _plain(stage.adapters)}
    for keys, kind, why in (
        (("lora", "ema_decay"), CheckpointError, ": its weights are kept in that form"),
        (("global_batch_size",), ConfigError, ": its steps count other samples"),
        (_KEPT_BY_OPTIMIZER, ConfigError, ": its optimizer would bring the old value back"),
    ):
        if changed := [key for key in keys if before.get(key) != now[key]]:
            listing = ", ".join(f"stage.{key}={before.get(key)}, now {now[key]}" for key in changed)
            raise kind(
                f"the checkpoint was trained with {listing}{why}. Restore the setting, or start the stage again in "
                "another run_dir"
            )


def check_collapse(found: Mapping[str, Any], connector: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a resumed stage would leave other blanks out than the checkpoint's model."""
    old, new = found["connector"].get("collapse"), connector.get("collapse")
    if old != new:
        raise CheckpointError(
            f"the checkpoint was trained with connector.collapse={old}, now {new}: the LLM would see other tokens. "
            "Restore it, or start the stage again in another run_dir"
        )


def check_parent(found: Mapping[str, str] | None, parent: Mapping[str, str] | None) -> None:
    """Raise a CheckpointError if a checkpoint's stage started from another folder than `stage.init_from`."""
    if found != parent:
        raise CheckpointError(
            f"the checkpoint's stage started from {_parent(found)}, stage.init_from holds {_parent(parent)}: give the "
            "folder that it started from, or start the stage again in another run_dir"
        )


def check_data(checkpoint: Mapping[str, Any], name: str) -> None:
    """Raise a CheckpointError if a checkpoint has the position of a DataModule of another class than `name`."""
    states = [key for key, value in checkpoint.items() if isinstance(value, dict) and "epoch_samples" in value]
    if states and name not in states:
        raise CheckpointError(
            f"the checkpoint was trained with {states[0]}, data.class_path is {name}: how far the data were read "
            "would be lost; use the same class, or start the stage again from its parent"
        )


def _completed(contract: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a contract whose connector has all options: one that the weights are older than had its default."""
    with contextlib.suppress(ConfigError, KeyError):  # of a type that is not here; an old record without connector
        return {**contract, "connector": connector_identity(contract["connector"])}
    return contract


def _plain(adapters: Mapping[str, Lora]) -> dict[str, Any] | None:
    return {part: asdict(lora) for part, lora in adapters.items()} or None


def _installed() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _parent(parent: Mapping[str, str] | None) -> str:
    if parent is None:
        return "no stage"
    return f"stage {parent['stage']!r} with weights {parent['weights_sha256'][:12]}…"


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in {**expected, **found}:
        old, new = found.get(key, "none"), expected.get(key, "none")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{key}.{inner}", one, other) for inner, one, other in _differences(old, new))
        elif old != new:
            yield key, old, new
