"""Activation checkpointing and compilation change what is kept and how it is computed, not what comes out."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.strategies.sharding import layers
from alignvlm_pl.training import acceleration
from alignvlm_pl.training.acceleration import (
    checkpoint_activations,
    choose_matmul_precision,
    compile_parts,
    skip_constant_buffers,
)
from alignvlm_pl.training.module import AlignVLMModule

# torch's compiler, of its own code.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:`torch.jit.script_method` is deprecated",
)


@pytest.fixture
def model(tmp_path):
    spec = tiny_spec(tmp_path)
    return build_model(spec, build_processor(spec))


def step(model, *, tiles=3):
    """Loss and gradients of a batch of two documents."""
    torch.manual_seed(1)
    tokens = model.config.tokens_per_tile
    ids = torch.randint(0, 250, (2, 2 * tokens + 9))
    counts = torch.tensor([2, tiles - 2])
    for row, count in enumerate(counts.tolist()):
        ids[row, : count * tokens] = model.config.image_token_id
    model.zero_grad()
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(tiles, 3, 56, 56),
        num_tiles=counts,
        labels=ids.masked_fill(ids == model.config.image_token_id, -100),
        use_cache=False,
    )
    output.loss_sum.backward()
    return float(output.loss_sum.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(found, expected, *, rtol=0.0):
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=rtol * float(gradient.abs().max()) + rtol)


@pytest.mark.parametrize("frozen", [(), ("vision_tower", "language_model")], ids=["trained", "frozen"])
@pytest.mark.parametrize("parts", [["vision"], ["llm"], ["vision", "llm"]], ids="+".join)
def test_layers_run_again_in_backward_with_the_same_gradients(model, parts, frozen):
    for part in frozen:
        getattr(model, part).requires_grad_(False).eval()
    expected = step(model)
    runs = dict.fromkeys(acceleration.CHECKPOINTED, 0)

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    for name in acceleration.CHECKPOINTED:
        for layer in layers(getattr(model, acceleration.PARTS[name])):
            layer.self_attn.register_forward_hook(count(name))
    checkpoint_activations(model, parts)
    assert_equal(step(model), expected)
    for name, found in runs.items():
        # Nothing below a frozen tower has a gradient, so it has no backward; a frozen LLM has one, for the connector.
        again = name in parts and not (frozen and name == "vision")
        assert found == (4 if again else 2), name


@pytest.mark.parametrize("part", ["vision", "connector", "llm"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_parts_give_the_same(model, part, checkpointed, monkeypatch):
    expected = step(model), step(model, tiles=4)
    names = set(model.state_dict())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(acceleration, "_COMPILE_BACKEND", backend)
    torch._dynamo.reset()
    if checkpointed:
        checkpoint_activations(model, ["vision", "llm"])
    compile_parts(model, [part])
    assert_equal(step(model), expected[0], rtol=1e-6)
    assert_equal(step(model, tiles=4), expected[1], rtol=1e-6)
    assert graphs
    assert set(model.state_dict()) == names


@pytest.mark.slow
def test_torchs_own_compiler_gives_the_same(model):
    expected = step(model)
    torch._dynamo.reset()
    compile_parts(model, ["vision"])
    assert_equal(step(model), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"activation_checkpointing": ["lm"]},
            r"model.activation_checkpointing names 'lm'; did you mean 'llm'\?",
        ),
        ({"activation_checkpointing": ["connector"]}, "known: llm, vision"),
        ({"compile": ["visio"]}, "model.compile names 'visio'; did you mean 'vision'"),
    ],
)
def test_unknown_parts_are_refused(tmp_path, settings, told):
    with pytest.raises(ConfigError, match=told):
        AlignVLMModule(spec=tiny_spec(tmp_path), **settings)


def test_a_trained_module_has_what_its_settings_say(tmp_path):
    module = AlignVLMModule(spec=tiny_spec(tmp_path), activation_checkpointing=["llm"], compile=["connector", "vision"])
    module.configure_model()
    compiled = {n for n, m in module.net.named_modules() if m._compiled_call_impl is not None}
    assert compiled == {"connector", *(f"vision_tower.encoder.layers.{i}" for i in range(2))}
    assert all("forward" in vars(layer) for layer in layers(module.net.language_model))
    assert not any("forward" in vars(layer) for layer in layers(module.net.vision_tower))


@pytest.mark.parametrize("statistics", [False, True])
def test_ddp_sends_buffers_only_where_some_may_change(model, tmp_path, statistics):
    if statistics:
        model.connector.norm1 = nn.BatchNorm1d(4)
    meeting = (tmp_path / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    wrapped = DistributedDataParallel(model)
    assert wrapped.will_sync_module_buffers(), "rotary tables at least"
    skip_constant_buffers(wrapped)
    assert wrapped.will_sync_module_buffers() == statistics


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "bf16-mixed", "high"), ("cuda", "32-true", "highest"), ("cpu", "bf16-mixed", "highest")],
)
def test_what_autocast_leaves_in_float32_takes_tf32(monkeypatch, device, precision, expected):
    chosen = ["highest"]
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    choose_matmul_precision(device, precision)
    assert chosen[-1] == expected
