"""Exports: Hugging Face folders of weights and processor, with a record of where they come from."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError

from ..errors import CheckpointError, ConfigError
from ..models.build import ModelSpec, build_model, load_weights
from ..models.loading import weights_folder
from ..models.modeling import AlignVLMForConditionalGeneration
from ..models.processing import AlignVLMProcessor
from ..strategies.meta_init import build_on_meta
from ..strategies.sharded_checkpoint import is_folder, load_file, make_whole, read_folder
from ..utils.atomic_files import atomic_path
from .checkpoint_metadata import CONTENTS, check_contract, contract
from .finite import diverged, first_invalid
from .lora import attach_adapters, has_adapters, merge_state, save_adapters
from .lora_config import parse_adapters

EXPORT_FOLDER = "hf"  # Path below the run folder
FILE_SIZE = "5GB"  # Default of the largest file of weights
RECORD = "stage.json"
ADAPTER_FOLDER = "adapter"
_RECORDED = ("stage", "processor", "weights_sha256")
_INPUT = ("chat_template", "tiling", "tokens_per_tile", "spell_answers")
"""Keys of a contract (`checkpoint_metadata.contract`): how pages and conversations become tokens."""


def weights_sha256(folder: Path) -> str:
    """Hash over the safetensors files of a folder and their index, in name order."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    spec: ModelSpec,
    processor: AlignVLMProcessor,
    weights: str | None = None,
    trained: AlignVLMForConditionalGeneration | None = None,
    max_shard_size: str = FILE_SIZE,
) -> dict[str, Any]:
    """Write the weights of a checkpoint as a Hugging Face folder; with `stage.ema_decay` their average.

    A checkpoint does not hold what adapters adapt: it is read from `weights`, the run's `model.weights`, or is that of
    the `trained` model, whose weights are replaced by those of the checkpoint. Returns the record, `folder/stage.json`.

    Raises:
        CheckpointError: The checkpoint is damaged, of another model, without a description or with a weight that is
            not finite, or needs a 4-bit base that is stored nowhere.
    """
    state = read_folder(checkpoint) if is_folder(checkpoint) else load_file(checkpoint)
    if CONTENTS not in state or "state_dict" not in state:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not say what it is: expected {CONTENTS!r} in it; another program's?"
        )
    contents, stage, history = state[CONTENTS], state[CONTENTS]["stage"], state.get("stage", {})
    check_contract(contents["processor"], contract(spec, processor), source=str(checkpoint))
    whole = make_whole(state["state_dict"])
    found = {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}
    adapters = parse_adapters(stage.get("lora"))
    if not adapters:
        model = build_on_meta(spec, processor, whole=True)
    elif trained is not None:
        model = trained
    else:
        start = stage.get("init_from") or weights
        for part, lora in adapters.items():
            if lora.load_in_4bit and start is None and getattr(spec, part).pretrained is None:
                raise CheckpointError(
                    f"checkpoint {checkpoint} does not hold the 4-bit base of {part}, whose weights were random; start "
                    "the stage from saved weights"
                )
        model = build_model(spec, processor, pretrained=start is None)
        if start is not None:
            load_weights(model, start)
        attach_adapters(model, adapters)
    compare_states(found, model.state_dict(), source=str(checkpoint))
    if name := first_invalid(found.items()):  # this rank is alone here
        raise diverged(f"checkpoint {checkpoint}", name)
    model.load_state_dict(found, assign=not adapters)
    model.tie_weights()
    record = {
        "stage": stage["name"],
        "settings": stage,
        "parent": contents["parent"],
        "steps": int(state["global_step"]),
        "seconds": round(float(history.get("seconds", 0.0)), 1),
        "samples_seen": contents["samples_seen"],
        "processor": contents["processor"],
        **({"calibration": history["calibration"]} if history.get("calibration") else {}),
        "versions": contents["versions"],
    }
    return export(model, processor, folder, record, max_shard_size=max_shard_size)


def export(
    model: Any, processor: Any, folder: Path, record: dict[str, Any], *, max_shard_size: str = FILE_SIZE
) -> dict[str, Any]:
    """Write model, processor and record as one folder that is either whole or absent; an earlier one is replaced.

    Adapters are merged, and written once more, alone, to `adapter/<part>`; `weights_sha256` is added to the record.
    Weights beyond `max_shard_size`, such as 5GB, go into several files with an index. A CheckpointError if the folder
    cannot be written, or merged weights are not finite; nothing that was there is lost.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder) as partial:
            merged = merge_state(model) if has_adapters(model) else None
            if merged is not None and (name := first_invalid(merged.items())):  # factors are finite, their product not
                raise diverged(f"{folder} is not written: merged adapters", name)
            model.save_pretrained(partial, state_dict=merged, max_shard_size=max_shard_size)
            if merged is not None:
                save_adapters(model, partial / ADAPTER_FOLDER)
            processor.save_pretrained(partial)
            record = {**record, "weights_sha256": weights_sha256(partial)}
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write weights to {folder}: {error}; free some space or set another run_dir"
        ) from error
    return record


def check_size(name: str, value: str) -> None:
    """Raise a ConfigError for an invalid size of files, with the name of the setting."""
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", value):
        raise ConfigError(f"{name}={value}: expected a size such as 5GB")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the record of an export; raise a CheckpointError if it is none, or its weights are not the recorded."""
    path, record = Path(folder), _read(Path(folder))
    if (found := weights_sha256(path)) != record["weights_sha256"]:
        raise CheckpointError(
            f"weights in {path} have sha256 {found[:12]}…, its {RECORD} says {record['weights_sha256'][:12]}…: "
            "the files were changed or damaged; run the stage that wrote them again"
        )
    return record


def recorded_steps(folder: str | Path) -> int:
    """Optimizer steps of the stage that wrote a folder of weights; 0 without a readable record."""
    try:
        return int(_read(Path(folder)).get("steps", 0))
    except CheckpointError:
        return 0


def _read(path: Path) -> dict[str, Any]:
    if not (path / RECORD).is_file():
        raise CheckpointError(f"{path} has no {RECORD}: expected the hf/ folder of a finished stage")
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / RECORD} is damaged ({error}); run the stage that wrote it again") from error
    if missing := [key for key in _RECORDED if not isinstance(record, dict) or key not in record]:
        raise CheckpointError(f"{path / RECORD} lacks {', '.join(missing)}; run the stage that wrote it again")
    return record


def compare_states(found: Mapping[str, Any], expected: Mapping[str, Any], *, source: str) -> None:
    """Raise a CheckpointError, with `source`, if names or shapes in a checkpoint, `found`, are not the model's."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not in the model" for name in found if name not in expected]
    differences += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and hasattr(expected[name], "shape") and found[name].shape != expected[name].shape
    ]
    if differences:
        raise CheckpointError(
            f"{source} is of another model ({len(differences)} differences): {differences[0]}; use the model config "
            "that the checkpoint was trained with"
        )


def verify_parent(folder: str | Path, *, parent: str | None, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of the folder that a stage starts from, `stage.init_from`.

    Raises a CheckpointError if it is not of the stage `parent` (None: any), of another contract, or damaged.
    """
    record = read_record(weights_folder(folder))
    if parent is not None and record["stage"] != parent:
        raise CheckpointError(f"stage.init_from={folder} was written by stage {record['stage']!r}, expected {parent!r}")
    check_contract(record["processor"], contract, source=str(folder))
    return record


def check_given(folder: str | Path, contract: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a stage has written `model.weights` with another tokenizer, connector or feature.

    Another tiling or template may be intended, such as training on larger pages, and is logged.
    """
    if not (Path(folder) / RECORD).is_file():
        return
    found, source = _read(Path(folder))["processor"], f"model.weights={folder}"
    bound = {key: value for key, value in contract.items() if key not in _INPUT}
    check_contract(found, {**bound, **{key: found[key] for key in _INPUT if key in found}}, source=source)
    try:
        check_contract(found, contract, source=source)
    except CheckpointError as difference:
        rank_zero_info(f"{difference}, unless it is to be trained with this one")
