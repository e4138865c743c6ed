"""The torch trunk against the published ONNX graph, and the converted weights against its initialisers.

Skipped where the weights package (or onnxruntime) is not installed.
"""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModel

from alignvlm_pl.models.pp_ocr import PP_OCRV6_SMALL_BLOCKS, PPOCRVisionModel
from alignvlm_pl.pretrained.cache import find_source_file
from alignvlm_pl.pretrained.pp_ocr import PP_OCR, ensure_pp_ocr_trunk, initialiser_names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PP_OCR.module) is None, reason=f"no weights: {PP_OCR.install_command}"
)
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """The trunk, converted afresh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return AutoModel.from_pretrained(ensure_pp_ocr_trunk()).eval()


@pytest.fixture(scope="module")
def graph():
    return onnx.load(str(find_source_file(PP_OCR)))


@pytest.fixture(scope="module")
def session(graph):
    """The graph cut at the input of its average pooling, with a free height."""
    ort = pytest.importorskip("onnxruntime")
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    pool = next(index for index, node in enumerate(cut.graph.node) if node.op_type == "AveragePool")
    features = cut.graph.node[pool].input[0]
    del cut.graph.node[pool:]
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    del cut.graph.value_info[:]
    height = cut.graph.input[0].type.tensor_type.shape.dim[2]
    height.Clear()
    height.dim_param = "height"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 256)])
def test_features_equal_the_onnx_graph(trunk, session, height, width):
    """Worst difference measured: 9.5e-5 on values up to 10."""
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)
    expected = session.run(None, {"x": np.ascontiguousarray(image[:, ::-1])})[0]
    with torch.inference_mode():
        features = trunk.features(torch.from_numpy(image)).numpy()
    assert features.shape == expected.shape == (2, 384, height // 16, width // 4)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-3)


def test_every_convolution_of_the_trunk_is_loaded(trunk, graph):
    """The named pairs are the weights of all convolutions before the pooling and the biases added to them."""
    nodes = graph.graph.node
    pool = next(index for index, node in enumerate(nodes) if node.op_type == "AveragePool")
    bias_of = {node.input[0]: node.input[1] for node in nodes[:pool] if node.op_type == "Add"}
    in_graph = {(node.input[1], bias_of[node.output[0]]) for node in nodes[:pool] if node.op_type == "Conv"}
    names = initialiser_names()
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    assert {(names[f"{module}.weight"], names[f"{module}.bias"]) for module in modules} == in_graph
    assert len(modules) == len(in_graph) == 54
    assert set(names) == set(trunk.state_dict())


def test_the_default_config_describes_the_converted_weights(trunk):
    assert isinstance(trunk, PPOCRVisionModel)
    assert [tuple(block) for block in trunk.config.blocks] == list(PP_OCRV6_SMALL_BLOCKS)
    assert trunk.config.hidden_size == 1536


def test_every_pretrained_parameter_gets_a_gradient(trunk):
    trunk.zero_grad()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trunk(image).last_hidden_state.square().mean().backward()
    without = [name for name, weight in trunk.named_parameters() if not _has_gradient(weight)]
    assert without == []


def _has_gradient(weight):
    return weight.grad is not None and bool(weight.grad.any())
