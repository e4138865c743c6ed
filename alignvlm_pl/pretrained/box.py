"""Models in the box: trained weights that come with the project, as a small difference from the pretrained parts.

`boxes/NAME.safetensors` holds what a recipe changed of the two embedded parts, in int8 with a scale for each row:

- `WEIGHT/left` (r, out) and `WEIGHT/right` (r, in) for a linear layer of the LLM: the change is leftᵀ · right;
- `WEIGHT/change` for other weights of the parts, and `WEIGHT/value` for those that the parts do not have;
- in its metadata the other files of the exported folder, of the tokenizer only what differs from the LLM's.

It is turned into a Hugging Face folder once, in the cache. `boxes/NAME.md` is its model card. Loads no torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, require_known
from .cache import WeightSource, ensure_folder, write_safetensors
from .pp_ocr import ensure_pp_ocr_trunk
from .smollm2 import ensure_smollm2

PREFIX = "box:"
RANK = 32
READING = "reading.json"
"""File of the folder that says how `alignvlm read` shows a page and asks: `page_width` in px, 0 for pages as they are,
`question` with {} for the field, and `transcribe`, the question for all text of a page."""
_BOXES = Path(__file__).with_name("boxes")
_WEIGHTS, _TOKENIZER, _RECORD = "model.safetensors", "tokenizer.json", "stage.json"
_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", _RECORD)
_TEMPLATE = "chat_template.jinja"
_PARTS = {"language_model.": ensure_smollm2, "vision_tower.": ensure_pp_ocr_trunk}
_CONVERTED_BYTES = 575_000_000
_Weights = dict[str, np.ndarray]


def ensure_box(name: str) -> Path:
    """Return a Hugging Face folder with the model of a box; written on the first call.

    Raises:
        ConfigError: No box has this name, a package of the pretrained parts is missing, or the cache cannot be written.
    """
    names = sorted(path.stem for path in _BOXES.glob("*.safetensors"))
    require_known(name, names, f"model {PREFIX}{name}")
    content = (_BOXES / f"{name}.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    box = WeightSource(
        name=f"box-{name}",
        package="alignvlm_pl",
        version=digest[:12],
        module="alignvlm_pl",
        path=f"pretrained/boxes/{name}.safetensors",
        num_bytes=len(content),
        sha256=digest,
        converted_bytes=_CONVERTED_BYTES,
    )
    return ensure_folder(box, build=unpack_box)


def pack_box(folder: Path, out: Path, *, reading: dict[str, Any], rank: int = RANK) -> dict[str, float]:
    """Write the box of an exported folder, whose parts are the embedded ones, and how its pages are to be read.

    Returns:
        `megabytes`, and `lost`: the largest share (Frobenius norm) of a linear layer's change that `rank` leaves out.

    Raises:
        ConfigError: The folder is no export of a model with these parts.
    """
    from safetensors.numpy import load_file, save_file

    if absent := [name for name in (*_FILES, _TEMPLATE, _TOKENIZER, _WEIGHTS) if not (folder / name).is_file()]:
        raise ConfigError(f"{folder} has no {absent[0]}: expected the hf/ folder of a stage of the embedded model")
    base, lost = _base(), 0.0
    packed: _Weights = {}
    for name, value in load_file(folder / _WEIGHTS).items():
        value = value.astype(np.float32)
        if name not in base:
            packed |= _quantised(f"{name}/value", value)
            continue
        if base[name].shape != value.shape:
            raise ConfigError(f"{folder}: {name} has shape {value.shape}, expected {base[name].shape} of the part")
        change = value - base[name]
        if not change.any():
            continue
        if name.startswith("language_model.") and change.ndim == 2 and min(change.shape) > rank:
            left, right = _factors(change, rank)
            lost = max(lost, float(np.linalg.norm(change - left.T @ right) / np.linalg.norm(change)))
            packed |= _quantised(f"{name}/left", left) | _quantised(f"{name}/right", right)
        else:
            packed |= _quantised(f"{name}/change", change)
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in (*_FILES, _TEMPLATE)}
    own, llm = (json.loads((at / _TOKENIZER).read_text(encoding="utf-8")) for at in (folder, ensure_smollm2()))
    changed = {key: value for key, value in own.items() if llm.get(key) != value}
    for name in (_RECORD, "config.json"):
        texts[name] = json.dumps(_without_folders(json.loads(texts[name])))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed, out, metadata={**texts, _TOKENIZER: json.dumps(changed), READING: json.dumps(reading)})
    out.chmod(0o644)  # safetensors makes its files private
    return {"megabytes": round(out.stat().st_size / 1e6, 2), "lost": round(lost, 4)}


def unpack_box(box: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a box: the pretrained parts with their changes, configuration and processor."""
    from safetensors import safe_open

    weights = _base()
    with safe_open(box, "np") as file:
        for key in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
            name, _, kind = key.rpartition("/")
            if kind == "left":
                weights[name] = weights[name] + _read(file, key).T @ _read(file, f"{name}/right")
            elif kind == "change":
                weights[name] = weights[name] + _read(file, key)
            elif kind == "value":
                weights[name] = _read(file, key)
        texts = dict(file.metadata())
    write_safetensors(weights, folder / _WEIGHTS)
    digest = hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()
    record = json.loads(texts[_RECORD]) | {"weights_sha256": digest}
    tokenizer = json.loads((ensure_smollm2() / _TOKENIZER).read_text(encoding="utf-8")) | json.loads(texts[_TOKENIZER])
    texts |= {_RECORD: json.dumps(record, indent=2), _TOKENIZER: json.dumps(tokenizer, ensure_ascii=False)}
    for name in (*_FILES, _TEMPLATE, _TOKENIZER, READING):
        (folder / name).write_text(texts[name], encoding="utf-8")


def _base() -> _Weights:
    """Return the weights of the pretrained parts by their names in the whole model."""
    from safetensors.numpy import load_file

    return {
        prefix + name: value
        for prefix, ensure in _PARTS.items()
        for name, value in load_file(ensure() / _WEIGHTS).items()
    }


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that name folders of the machine that trained."""
    inner = {key: _without_folders(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if key not in ("init_from", "_name_or_path")}


def _factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (r, out) and (r, in) whose product, the first transposed, is the nearest of this rank to a change
    (out, in): a randomised singular value decomposition (Halko et al. 2011, algorithm 4.4 with one iteration).
    """
    start = np.random.default_rng(0).standard_normal((change.shape[1], rank + 8), dtype=np.float32)
    basis, _ = np.linalg.qr(change @ start)
    basis, _ = np.linalg.qr(change @ (change.T @ basis))
    left, sizes, right = np.linalg.svd(basis.T @ change, full_matrices=False)
    roots = np.sqrt(sizes[:rank, None])
    return roots * (basis @ left).T[:rank], roots * right[:rank]


def _quantised(name: str, values: np.ndarray) -> _Weights:
    """Return values as int8 with a scale for each of their rows; vectors as they are."""
    if values.ndim < 2:
        return {name: values}
    scale = np.abs(values).reshape(len(values), -1).max(axis=1) / 127
    steps = values.reshape(len(values), -1) / np.where(scale, scale, 1)[:, None]
    whole = np.rint(steps).astype(np.int8, order="C")  # safetensors writes the memory as it lies
    return {name: whole.reshape(values.shape), f"{name}/scale": scale.astype(np.float32)}


def _read(file: Any, key: str) -> np.ndarray:
    """Return an entry of a box in float32."""
    values: np.ndarray = file.get_tensor(key)
    if values.dtype != np.int8:
        return values
    scale = file.get_tensor(f"{key}/scale").reshape(-1, *[1] * (values.ndim - 1))
    return values.astype(np.float32) * scale
