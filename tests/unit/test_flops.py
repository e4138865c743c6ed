"""Counted work against torch's counter on whole steps, and against formulas by hand."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignvlm_pl.models.build import Backbone, ModelSpec, build_config, build_model, build_processor
from alignvlm_pl.models.connectors import CONNECTORS
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.flops import Work, count_pairs, count_work, named_peak, peak_flops, stage_work
from alignvlm_pl.training.optim import freeze
from alignvlm_pl.training.stage import Stage
from callbacks.throughput import run_tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "c_abstractor": {"hidden": 16, "depth": 1, "pool": [2, 2]},
    "ovis": {"visual_vocab": 100},
    "perceiver": {"num_latents": 5, "depth": 2},
}
TABLES = [table for table in itertools.product((1e-3, None), repeat=3) if any(table)]


def model_of(folder, connector, table=(1e-3, 1e-3, 1e-3), **fields):
    spec = tiny_spec(folder, connector=connector, **fields)
    model = build_model(spec, build_processor(spec))
    rates = dict(zip(("lr_vision", "lr_connector", "lr_llm"), table, strict=True))
    freeze(model, Stage(name="some", **rates))
    for part in (model.vision_tower, model.language_model):
        part.set_attn_implementation("eager")
    if hasattr(model.connector, "backend"):
        model.connector.backend = "eager"
    return model


def meta_copy(model):
    return copy.deepcopy(model).to("meta")


def batch_of(model, tiles, text=9, answer=4):
    """One document; `answer` of its positions are supervised."""
    visual = tiles * model.config.tokens_per_tile
    ids = torch.cat([torch.full((visual,), model.config.image_token_id), torch.arange(3, 3 + text)])[None]
    labels = torch.full_like(ids, -100)
    labels[0, -answer:] = ids[0, -answer:]
    pixels = torch.zeros(tiles, 3, 56, 56)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "num_tiles": torch.tensor([tiles])}


def counted(model, batch):
    """Operations of a step by torch's counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(**batch, use_cache=False).loss_sum
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(CONNECTORS))
@pytest.mark.parametrize("table", TABLES)
def test_work_is_that_of_a_whole_step(tmp_path, name, table):
    model = model_of(tmp_path, {"type": name, **OPTIONS.get(name, {})}, table)
    work = count_work(meta_copy(model))
    tokens = 3 * model.config.tokens_per_tile + 20
    own = work.total(tiles=3, tokens=tokens, pairs=tokens**2, supervised=7)
    assert own == counted(model, batch_of(model, 3, 20, 7))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"tied": False},
        {"connector": {"type": "align", "vocab_keep": [1, 5, 9]}},
        {"connector": {"type": "align", "pixel_shuffle": 2}},
        {"vision_feature": "penultimate"},
        {"llm": {"model_type": "qwen2", "num_key_value_heads": 4}},
    ],
    ids=["untied", "pruned", "shuffled", "penultimate", "qwen2"],
)
def test_work_of_other_models(tmp_path, fields):
    model = model_of(tmp_path, fields.pop("connector", None), **fields)
    tokens = 2 * model.config.tokens_per_tile + 9
    own = count_work(meta_copy(model)).total(tiles=2, tokens=tokens, pairs=tokens**2, supervised=4)
    assert own == counted(model, batch_of(model, 2))


@pytest.mark.parametrize("connector", [{"type": "align"}, {"type": "align", "vocab_keep": [1, 5, 9]}, {"type": "mlp"}])
@pytest.mark.parametrize("objective", ["answer", "read", "patch"])
def test_work_of_a_stage_needs_the_configuration_alone(tmp_path, connector, objective):
    if (connector["type"], objective) == ("mlp", "read"):
        return
    model = model_of(tmp_path, connector, (None, 1e-3, None))
    stage = Stage(name="some", lr_connector=1e-3, objective=objective)
    before = copy.deepcopy(model.config.to_dict())
    assert stage_work(model.config, stage) == count_work(meta_copy(model), objective=objective)
    assert model.config.to_dict() == before


def test_adapters_are_counted(tmp_path):
    model = model_of(tmp_path, {"type": "align"}, (None, 1e-3, None))
    plain = Stage(name="some", lr_connector=1e-3)
    lora = {"llm": {"r": 4, "load_in_4bit": True}}
    drawn = torch.random.get_rng_state()
    work, own = (stage_work(model.config, s) for s in (plain, replace(plain, lr_llm=1e-3, lora=lora)))
    assert torch.equal(torch.random.get_rng_state(), drawn), "adapters are drawn once, by the stage"
    assert own.llm > work.llm, "the adapters' products"
    assert own.head == work.head


def test_work_by_hand(tmp_path):
    """SigLIP, Align and Llama, all trained: three products for each that there is forward, as PaLM says."""
    model = model_of(tmp_path, {"type": "align"})
    d, width, rows, tokens, layers = 32, 64, 259, 16, 2
    work = count_work(meta_copy(model))
    # Patches have no gradient; then q, k, v, out, two of the feed-forward of 2d, and attention's two products.
    patches = 2 * 2 * tokens * (3 * 14 * 14) * d
    assert work.vision == patches + layers * 3 * 2 * (tokens * (4 * d * d + 4 * d * d) + 2 * tokens**2 * d)
    assert work.connector == 3 * 2 * tokens * (d * width + 2 * width * rows)  # W1, W2, E_text: six vocabulary products
    kv = width // 2
    matrices = 2 * width * width + 2 * width * kv + 3 * width * 2 * width
    # transformers 5.17 computes the rotary angles by a matrix product, one for each frequency of a head.
    frequencies = model.config.text_config.head_dim // 2
    assert work.llm - layers * 6 * matrices in (0, 2 * frequencies)
    assert work.attention == layers * 12 * width  # PaLM: 12 · L · H · Q for each of T tokens
    assert work.head == 6 * width * rows


@pytest.mark.slow
def test_work_of_the_paper_s_model(tmp_path):
    """SigLIP-400M and Llama-3.2-1B, described only: PaLM's 6N, and 12 · L · H · Q."""
    fields = yaml.safe_load((Path(__file__).parents[2] / "configs/model/llama3.2-1b.yaml").read_text())["spec"]
    parts = {name: Backbone(config=fields[name]["config"]) for name in ("vision", "llm")}
    with torch.device("meta"):
        spec = ModelSpec(**parts, connector=fields["connector"], tiling=fields["tiling"])
        model = AlignVLMForConditionalGeneration(build_config(spec, image_token_id=0))
    work = count_work(meta_copy(model))
    matrices = sum(p.numel() for p in model.language_model.get_decoder().layers.parameters() if p.ndim == 2)
    assert work.llm == 6 * matrices
    assert work.attention == 12 * 16 * 32 * 64
    assert work.head == 6 * 2048 * 128256
    assert work.connector == 6 * 729 * (1152 * 2048 + 2 * 128256 * 2048)


def test_frozen_parts_have_no_gradients_of_weights(tmp_path):
    full = count_work(meta_copy(model_of(tmp_path, {"type": "align"})))
    connector = count_work(meta_copy(model_of(tmp_path, {"type": "align"}, (None, 1e-3, None))))
    tokens, d, width, rows = 16, 32, 64, 259
    # The tower runs forward alone; nothing below W1 has a gradient, and E_text has none of its own.
    assert connector.connector == full.connector - 2 * tokens * (d * width + width * rows)
    assert connector.head == full.head * 2 / 3
    assert connector.attention == full.attention
    patches = 2 * tokens * (3 * 14 * 14) * d
    assert connector.vision == (full.vision - 2 * patches) / 3 + patches
    only_llm = count_work(meta_copy(model_of(tmp_path, {"type": "mlp"}, (None, None, 1e-3))))
    assert only_llm.connector == 2 * tokens * (d * width + width * width)


def test_blocks_that_are_frozen_run_forward_alone(tmp_path):
    model = model_of(tmp_path, {"type": "align"}, (None, None, 1e-3))
    full = count_work(meta_copy(model))
    freeze(model, Stage(name="x", lr_llm=1e-3, last_blocks={"llm": 1}))
    last = count_work(meta_copy(model))
    per_block = sum(p.numel() for p in model.language_model.get_decoder().layers[-1].parameters() if p.ndim == 2)
    assert full.llm - last.llm == 4 * per_block  # the other block's backward
    assert last.head == full.head * 2 / 3


def test_reading_runs_no_llm(tmp_path):
    model = model_of(tmp_path, {"type": "align"}, (None, 1e-3, None))
    work = count_work(meta_copy(model), objective="read")
    with FlopCounterMode(display=False) as counter:
        model.read(torch.zeros(2, 3, 56, 56), torch.tensor([3, 5])).sum().backward()
    assert work.total(tiles=2, tokens=99, pairs=99, supervised=9) == counter.get_total_flops()


def test_parts_add_up():
    work = Work(vision=2.0, connector=3.0, llm=5.0, attention=7.0, head=11.0)
    amounts = {"tiles": 2, "tokens": 10, "pairs": count_pairs([4, 6]), "supervised": 3}
    assert work.by_part(**amounts) == {"vision": 4, "connector": 6, "llm": 50 + 7 * 52, "head": 33}
    assert work.total(**amounts) == 4 + 6 + 50 + 7 * 52 + 33


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),
        ("Something Else", None),
    ],
)
def test_peaks_by_name(name, tflops):
    assert named_peak(name) == (None if tflops is None else tflops * 1e12)


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_tokens_that_are_left_out_are_no_work():
    kept = torch.tensor([3, 4, 1])  # of the one tile of the first document, and of the two of the second
    assert run_tokens([10, 20, 5], [1, 2, 0], kept, tokens_per_tile=4) == [9, 17, 5]
    assert run_tokens([10, 20, 5], [1, 2, 0], None, tokens_per_tile=4) == [10, 20, 5]
