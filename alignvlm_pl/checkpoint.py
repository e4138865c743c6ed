"""Stage-end folders: Hugging Face weights, processor, and a record of where they come from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError

RECORD = "stage.json"


def weights_sha256(folder: Path) -> str:
    """Hash over the safetensors files of a folder, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def export(
    model: Any,
    processor: Any,
    folder: Path,
    record: dict[str, Any],
    *,
    save: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Write model, processor and record as one folder that is either whole or absent.

    Args:
        model: A Hugging Face model.
        processor: Its processor.
        folder: Where to; replaced if it exists.
        record: Facts about the stage; `weights_sha256` is added.
        save: What writes the model into a folder; null: its `save_pretrained`.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written; nothing that was there is lost.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (save or model.save_pretrained)(partial)
        processor.save_pretrained(partial)
        record = {**record, "weights_sha256": weights_sha256(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            old = folder.with_name(folder.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old)
        else:
            os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"could not write weights to {folder}: {error}; free some space or set another run_dir"
        ) from error
    return record


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a stage-end folder.

    Raises:
        CheckpointError: If the folder is not one, or its weights are not the recorded ones.
    """
    path = Path(folder)
    if not (path / RECORD).is_file():
        raise CheckpointError(
            f"{path} has no {RECORD}: expected the hf/ folder that a finished stage leaves behind"
        )
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text())
        missing = [key for key in ("stage", "tiling", "weights_sha256") if key not in record]
    except ValueError as error:
        raise CheckpointError(
            f"{path / RECORD} is damaged ({error}); run the stage that wrote it again"
        ) from error
    if missing or not isinstance(record, dict):
        raise CheckpointError(
            f"{path / RECORD} lacks {', '.join(missing)}; run the stage that wrote it again"
        )
    found = weights_sha256(path)
    if found != record["weights_sha256"]:
        raise CheckpointError(
            f"weights in {path} have sha256 {found[:12]}…, its {RECORD} says {record['weights_sha256'][:12]}…: "
            "the files were changed or damaged; run the stage that wrote them again"
        )
    return record


def compare_states(found: Mapping[str, Any], expected: Mapping[str, Any], *, source: str) -> None:
    """Refuse the state of another model.

    Args:
        found: Name -> tensor in the checkpoint.
        expected: Name -> tensor of the model.
        source: Setting or file that `found` comes from, for the message.

    Raises:
        CheckpointError: With the number of differences and the first one.
    """
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


def verify_parent(folder: str | Path, *, parent: str | None, tiling: dict[str, Any]) -> dict[str, Any]:
    """Check the folder that a stage starts from.

    Args:
        folder: `stage.init_from`.
        parent: Name the stage expects, or None for any.
        tiling: Tiling of the model that will load it.

    Raises:
        CheckpointError: Naming both values, if the stage or the tiling differs, or the weights are damaged.
    """
    record = read_record(folder)
    if parent is not None and record["stage"] != parent:
        raise CheckpointError(
            f"stage.init_from={folder} was written by stage {record['stage']!r}, expected {parent!r}"
        )
    if record["tiling"] != tiling:
        raise CheckpointError(f"{folder} was trained with tiling {record['tiling']}, the model has {tiling}")
    return record
