"""Load pretrained weights; errors and warnings of Hugging Face's loaders become one short error."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigError
from ..pretrained.box import PREFIX, READING, ensure_box


def weights_folder(source: Any) -> Any:
    """Return the folder of the model that `box:NAME` names, or else the folder, hub id or None as it is.

    Raises:
        ConfigError: No box has this name, or its folder cannot be written, see `pretrained.box.ensure_box`.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return str(ensure_box(source.removeprefix(PREFIX)))
    return source


def reading_settings(folder: str | Path) -> dict[str, Any]:
    """Return how the pages of a model are shown and asked about, from its folder.

    `page_width`: pages are cut to their content and scaled to this width in px; 0, the default, leaves them as they
    are. `question`: the question for a field, in place of {}. `transcribe`: the question for all text of a page; the
    default is one of those that the synthetic documents train.
    """
    path = Path(folder) / READING
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"page_width": 0, "question": "What is the {}?", "transcribe": "Transcribe the page.", **settings}


def load_pretrained(loader: Any, source: str | Path, *, what: str) -> tuple[PreTrainedModel, set[str]]:
    """Load a model of an Auto class or model class in float32, on the CPU; `what` is its name in errors.

    Returns:
        The model, and the names of its tensors that the weights lack (Hugging Face initialises them randomly).

    Raises:
        CheckpointError: If there is no model at `source`, a folder or hub id, it is damaged or of another type, or a
            tensor does not have the shape given by its `config.json`.
    """
    if str(source).startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise CheckpointError(f"{what} weights: there is no folder {str(source)!r}; give a folder or a hub id")
    try:
        # Lightning builds in the context of its GPU, onto which transformers would load, with the package accelerate.
        with torch.device("cpu"):
            model, info = loader.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{what} weights cannot be loaded from {str(source)!r}: {reason}; expected a folder written by "
            "save_pretrained, or the hub id of a model of this kind"
        ) from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{what} weights in {source}: {name} has shape {tuple(found)}, by config.json it is {tuple(expected)} "
            f"({len(mismatched)} tensors differ); the two are of different models, or the embeddings were resized or "
            "padded and vocab_size does not say so"
        )
    return model, set(info["missing_keys"])


def copy_weights(target: torch.nn.Module, state: dict[str, Any], *, what: str, source: str | Path) -> None:
    """Copy `state` into `target`; raise a `CheckpointError` if a tensor is missing, left over, or of another shape."""
    try:
        target.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = "".join(str(error).splitlines()[1:2]).strip()[:300]
        raise CheckpointError(
            f"{what} weights in {source} are of another model than the configured one: {first}; use the model config "
            "that they were trained with"
        ) from error


def require_complete(missing: set[str], *, what: str, source: str | Path) -> None:
    """Raise a `CheckpointError` if weights lack tensors of the model."""
    if missing:
        raise CheckpointError(
            f"{what} weights in {source} lack {len(missing)} of the model's tensors, first {min(missing)!r}; is it the "
            "checkpoint of another model?"
        )


def require_model_type(folder: str | Path, expected: str) -> None:
    """Raise a `CheckpointError` if the `config.json` of a folder is missing or has another `model_type`.

    Hugging Face's loader would then build a model of default (large) size with random weights.
    """
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no readable config.json: expected a folder written by this project or save_pretrained"
        ) from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); write the folder again") from error
    if found != expected:
        raise CheckpointError(f"{folder} holds a model of type {found!r}, expected {expected!r}")


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention; raise a `ConfigError` if there is none of this name, or its package is missing."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model.attention={name!r}: {str(error).splitlines()[0][:200]}") from error
