"""LoRA and QLoRA: inject peft's layers into parts of the model, merge them for export, save them in peft's layout."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, nearest
from .lora_config import ALL_LINEAR, Lora
from .optim import last_blocks
from .stage import PARTS

ADAPTER = "default"  # Name of the adapter within peft's layers
_BASE, _FACTORS = ".base_layer.", (".lora_A.", ".lora_B.")


def attach_adapters(model: nn.Module, adapters: Mapping[str, Lora]) -> None:
    """Inject an adapter into each given part, in place, and freeze the part's own weights; errors as `check_adapters`.

    Outputs do not change at first. Embedding table and LM head get none: ALIGN averages the table's rows, and the two
    may be tied. Called after weights are loaded and before a strategy wraps the model.
    """
    check_adapters(model, adapters)
    for part, lora in adapters.items():
        module = getattr(model, PARTS[part])
        if lora.load_in_4bit:
            quantize_linear(module)
        _inject(module, lora, part)


def check_adapters(model: nn.Module, adapters: Mapping[str, Lora]) -> None:
    """Raise a ConfigError if a package or CUDA is missing, or a name in `target_modules` matches no linear layer.

    The model may be on the meta device.
    """
    for part, lora in adapters.items():
        _require("peft", f"stage.lora.{part}")
        _check_targets(getattr(model, PARTS[part]), part, lora)
        if lora.load_in_4bit:
            _check_4bit(part)


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a part; a byte of a 4-bit layer counts as two."""
    return sum(p.numel() * (2 if _is_4bit(p) else 1) for p in module.parameters())


@torch.no_grad()
def merge_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of a model with adapters, merged: W + alpha / r · B A in place of W, A and B.

    Names, shapes and precision (float32 for 4-bit layers) are those of the model before `attach_adapters`.
    """
    state = {name: value for name, value in model.state_dict().items() if not any(part in name for part in _FACTORS)}
    merged = {name.replace(_BASE, "."): value for name, value in state.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and _is_4bit(layer.weight):
            merged[f"{name}.weight".replace(_BASE, ".")] = _dequantize(layer)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight, update = merged[f"{name}.weight"], cast(Any, layer).get_delta_weight(ADAPTER)
            merged[f"{name}.weight"] = (weight.to(update.dtype) + update).to(weight.dtype)
    return merged


def has_adapters(model: nn.Module) -> bool:
    """Return whether any part has an adapter."""
    return any(hasattr(getattr(model, attribute, None), "peft_config") for attribute in PARTS.values())


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write each part's adapter to `folder/<part>`, in the layout that peft's `PeftModel.from_pretrained` reads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for part, attribute in PARTS.items():
        module: Any = getattr(model, attribute)
        if not hasattr(module, "peft_config"):
            continue
        target = folder / part
        target.mkdir(parents=True)
        factors = get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
        named = {f"base_model.model.{name}": value.contiguous() for name, value in factors.items()}
        save_file(named, target / "adapter_model.safetensors", metadata={"format": "pt"})
        module.peft_config[ADAPTER].save_pretrained(target)


def quantize_linear(module: nn.Module) -> None:
    """Replace the linear layers of a part except the LM head by NF4 layers (bitsandbytes' `Linear4bit`), in place.

    They compute in bfloat16. Their weights are frozen and not in the state_dict; they are loaded from the pretrained
    weights.
    """
    import bitsandbytes

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    for name, layer in list(_linear(module)):
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        new.bias = layer.bias
        new.register_state_dict_post_hook(_drop_weight)
        new.register_load_state_dict_pre_hook(_keep_weight)
        module.set_submodule(name, new.to(device))
    module.is_loaded_in_4bit = True  # type: ignore[assignment]  # read by peft


def _drop_weight(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight")]:
        del state[name]


def _keep_weight(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[f"{prefix}weight"] = layer.weight.data


def _inject(module: nn.Module, lora: Lora, part: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(module, lora, part),
    )
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)


def _targets(module: nn.Module, lora: Lora, part: str) -> list[str]:
    """Return the names of the linear layers that get an adapter."""
    found = [(name, layer) for name, layer in _linear(module) if _is_target(name, lora.target_modules)]
    if lora.last_blocks is not None:
        blocks = last_blocks(module, lora.last_blocks, setting=f"stage.lora.{part}.last_blocks")
        inside = {layer for block in blocks for layer in block.modules()}
        found = [(name, layer) for name, layer in found if layer in inside]
    return [name for name, _ in found]


def _check_targets(module: nn.Module, part: str, lora: Lora) -> None:
    layers = [name for name, _ in _linear(module)]
    known = {name.rsplit(".", 1)[-1] for name in layers}
    for name in [] if lora.target_modules == ALL_LINEAR else lora.target_modules:
        if not any(_is_target(layer, [name]) for layer in layers):
            raise ConfigError(
                f"stage.lora.{part}.target_modules: there is no linear layer {name!r} that takes an adapter; "
                f"{nearest(name, known)}"
            )
    if not known:
        raise ConfigError(
            f"stage.lora.{part}: the part has no linear layer for an adapter; leave stage.lora.{part} out, and "
            f"stage.lr_{part} trains the part itself"
        )


def _is_target(layer: str, names: str | list[str]) -> bool:
    return names == ALL_LINEAR or any(f".{layer}".endswith(f".{name}") for name in names)


def _linear(module: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and module of the linear layers of a part, without the LM head."""
    head = module.get_output_embeddings()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            yield name, layer


def _is_4bit(weight: Any) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _dequantize(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.reshape(layer.out_features, layer.in_features).float()


def _check_4bit(part: str) -> None:
    where = f"stage.lora.{part}.load_in_4bit"
    _require("bitsandbytes", where)
    if not torch.cuda.is_available():
        raise ConfigError(f"{where} needs a CUDA device, and none was found; set load_in_4bit: false")


def _require(package: str, where: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{where} needs the package {package}, which is not installed: pip install {package}")
