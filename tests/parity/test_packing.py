"""Packed rows against the same documents alone: nothing leaks between them, and nothing else changes."""

import copy
import os
import shutil
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.sequences import document_positions, packed_arguments
from alignvlm_pl.models.tiny import tiny_spec
from tests.drills.launch import FRESH

ATTENTIONS = ("eager", "sdpa")
A, OTHER_A, B, C, TEXT = (
    ("What is the sum?", "12", (120, 60), 1),
    ("How do they go??", "7z", (120, 60), 2),  # as long as A, and as large
    ("And what is the total of all?", "yes, 7", (40, 50), 3),
    ("Why", "no", (60, 130), 4),
    ("Only words?", "words", None, 0),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A processor, and a model with weights so large that a leak would show."""
    torch.manual_seed(0)
    spec = tiny_spec(tmp_path_factory.mktemp("tokenizer"), connector={"type": "align", "gain_init": 3.0}, tied=False)
    processor = build_processor(spec)
    model = build_model(spec, processor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8.0 if "language_model" in name else 3.0)
    return processor, model


def encode(processor, document):
    question, answer, size, seed = document
    content, images = [{"type": "text", "text": question}], []
    if size is not None:
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        images, content = [Image.fromarray(pixels)], [{"type": "image"}, *content]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return processor.encode(messages, images)


def pack(processor, rows):
    batch = processor.collate_packed([[encode(processor, document) for document in row] for row in rows])
    batch.pop("document_tiles")
    return batch


def attending(model, attention):
    model = copy.deepcopy(model)
    model.language_model.set_attn_implementation(attention)
    return model


def losses_and_gradients(model, batch, *, bfloat16=False):
    """Output of a forward, and the gradient of its loss sum by each parameter."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
        output = model(**batch)
    output.loss_sum.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def only(batch, segment):
    """The batch with the labels of one document of its first row alone."""
    kept = batch["segment_ids"] == segment
    kept[1:] = False
    return {**batch, "labels": batch["labels"].masked_fill(~kept, -100)}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("after", [True, False])
def test_another_document_changes_neither_loss_nor_gradient_by_a_bit(parts, attention, after, bfloat16):
    processor, model = parts
    model = attending(model, attention)
    results = []
    for other in (A, OTHER_A):
        batch = pack(processor, [[other, B] if after else [B, other], [C]])
        assert not batch["attention_mask"].bool().all(), "padding is at work"
        results.append(losses_and_gradients(model, only(batch, 1 + after), bfloat16=bfloat16))
    (first, gradients), (second, others) = results
    assert torch.equal(first.loss_sum, second.loss_sum)
    assert first.document_loss_sums.tolist() == second.document_loss_sums.tolist()
    for name, gradient in gradients.items():
        assert bool(gradient.isfinite().all()), name
        assert torch.equal(gradient, others[name]), name
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.9 * len(gradients)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_losses_and_gradients_are_those_of_the_documents_alone(parts, attention, bfloat16):
    processor, model = parts
    model = attending(model, attention)
    documents = [A, B, C, TEXT, OTHER_A]
    batch = pack(processor, [[A, B], [C, TEXT, OTHER_A]])
    packed, gradients = losses_and_gradients(model, batch, bfloat16=bfloat16)
    alone, summed = [], {}
    for document in documents:
        single = processor.collate([encode(processor, document)])
        output, found = losses_and_gradients(model, single, bfloat16=bfloat16)
        alone.append(output)
        summed = {name: summed.get(name, 0) + gradient for name, gradient in found.items()}
    sums = torch.stack([output.loss_sum.detach() for output in alone])
    counts = torch.stack([output.num_supervised for output in alone])
    # Rows of another length are other matrices: the order of additions differs. Measured worst case: 3e-7 relative in
    # float32 (gradients together 1.5e-6), 4e-4 under bfloat16 autocast (gradients 8e-3).
    tolerance, steps = (4e-3, 5e-2) if bfloat16 else (2e-6, 1e-5)
    torch.testing.assert_close(packed.document_loss_sums, sums, rtol=tolerance, atol=0)
    torch.testing.assert_close(packed.loss_sum.detach(), sums.sum(), rtol=tolerance, atol=0)
    assert packed.document_supervised.tolist() == counts.tolist()
    off = torch.stack([(gradients[name] - value).norm() for name, value in summed.items()]).norm()
    assert off < steps * torch.stack([value.norm() for value in summed.values()]).norm()


def test_without_segments_the_documents_would_see_each_other(parts):
    """What the tests above would miss if the model were blind to the documents before."""
    processor, model = parts
    sums = []
    for other in (A, OTHER_A):
        batch = only(pack(processor, [[other, B]]), 2)
        batch.pop("segment_ids")
        sums.append(float(model(**batch).loss_sum.detach()))
    assert abs(sums[0] - sums[1]) > 1e-2


def test_the_first_token_of_a_document_is_no_target_of_the_one_before(parts):
    """The labels are shifted by one over the whole row; that shift must not cross documents."""
    processor, _ = parts
    items = [encode(processor, document) for document in (A, B)]
    for item in items:
        item.labels[:] = item.input_ids  # as if everything were supervised, the first token too
    batch = processor.collate_packed([items])
    start = len(items[0].input_ids)
    assert batch["segment_ids"][0, start - 1 : start + 1].tolist() == [1, 2]
    assert batch["labels"][0, [0, start]].tolist() == [-100, -100]
    assert batch["labels"][0, start + 1 :].tolist() == items[1].labels[1:].tolist()


def test_packed_batches_hold_whole_documents_and_their_tiles(parts):
    processor, _ = parts
    rows = [[encode(processor, A), encode(processor, TEXT)], [encode(processor, B)]]
    batch = processor.collate_packed(rows)
    lengths = [[len(item.input_ids) for item in row] for row in rows]
    assert batch["segment_ids"].shape == batch["input_ids"].shape == (2, max(map(sum, lengths)))
    for row, sizes in enumerate(lengths):
        padding = [0] * (batch["segment_ids"].shape[1] - sum(sizes))
        expected = [number for number, size in enumerate(sizes, start=1) for _ in range(size)] + padding
        assert batch["segment_ids"][row].tolist() == expected
        ids = [token for item in rows[row] for token in item.input_ids]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
    assert torch.equal(batch["attention_mask"].bool(), batch["segment_ids"] > 0)
    assert (batch["labels"][batch["segment_ids"] == 0] == -100).all()
    tiles = [item.num_tiles for row in rows for item in row]
    assert batch["document_tiles"].tolist() == tiles
    assert batch["num_tiles"].tolist() == [tiles[0] + tiles[1], tiles[2]]
    assert torch.equal(batch["pixel_values"], torch.from_numpy(np.concatenate([i.pixels for row in rows for i in row])))
    assert batch["tile_boxes"].tolist() == [box for row in rows for i in row for box in i.tile_boxes.tolist()]


def test_positions_restart_in_every_document_and_in_the_padding():
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8])
    assert document_positions(segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [*range(8)]]


def test_masks_have_the_form_that_eager_and_sdpa_take(parts):
    _, model = parts
    segments = torch.tensor([[1, 1, 2, 0]])
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    embeds = torch.zeros(1, 4, 8)
    masks = {}
    for attention in ATTENTIONS:
        decoder = attending(model, attention).language_model.get_decoder()
        masks[attention] = packed_arguments(decoder, embeds, segments)["attention_mask"]
    assert torch.equal(masks["sdpa"], torch.zeros(4, 4).masked_fill(~seen, -torch.inf)[None, None])
    assert torch.equal(masks["eager"], torch.zeros(4, 4).masked_fill(~seen, torch.finfo().min)[None, None])


def test_a_sliding_window_is_kept_within_the_documents(tmp_path):
    """Mistral's layers see 8 tokens back; alone and packed alike."""
    spec = tiny_spec(tmp_path, llm={"model_type": "mistral", "sliding_window": 8})
    processor = build_processor(spec)
    for attention in ATTENTIONS:
        model = attending(build_model(spec, processor), attention)
        packed = model(**pack(processor, [[A, B], [C]]))
        alone = [model(**processor.collate([encode(processor, document)])).loss_sum for document in (A, B, C)]
        torch.testing.assert_close(packed.document_loss_sums, torch.stack(alone).detach(), rtol=2e-6, atol=0)


def test_flash_attention_gets_the_bounds_of_the_documents(parts, monkeypatch):
    """The kernel needs a GPU; an attention that reads the same arguments takes its place here."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def within_bounds(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        rows, heads, length, width = query.shape
        groups = module.num_key_value_groups
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        flat = [x.transpose(1, 2).reshape(rows * length, heads, width).transpose(0, 1) for x in (query, key, value)]
        bounds = kwargs["cu_seq_lens_q"].tolist()
        assert kwargs["cu_seq_lens_k"].tolist() == bounds
        sizes = [last - first for first, last in pairwise(bounds)]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(sizes)
        parts = zip(*(x.split(sizes, dim=1) for x in flat), strict=True)
        out = [scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts]
        return torch.cat(out, dim=1).transpose(0, 1).reshape(rows, length, heads, width), None

    processor, model = parts
    batch = pack(processor, [[A, B], [C, TEXT, OTHER_A]])
    expected = model(**batch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", within_bounds)
    flash = copy.deepcopy(model)
    flash.language_model.config._attn_implementation = "flash_attention_2"
    found = flash(**batch)
    torch.testing.assert_close(found.document_loss_sums, expected.document_loss_sums, rtol=2e-6, atol=0)
    arguments = packed_arguments(flash.language_model.get_decoder(), torch.zeros(1), batch["segment_ids"])
    bounds, longest = prepare_fa_kwargs_from_position_ids(arguments["position_ids"])
    assert torch.equal(arguments["cu_seq_lens_q"], bounds[0])
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == int(longest[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:flex_attention called")
@pytest.mark.parametrize(
    "stance",
    [
        "force_eager",
        pytest.param(
            "default",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(FRESH not in os.environ, reason="half a minute of compiling: make drills"),
                pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles it with g++ on the CPU"),
            ],
        ),
    ],
)
def test_flex_attention_keeps_documents_apart(parts, stance):
    """Forward only, as torch has no backward of it on the CPU; in `make drills` compiled, too."""
    processor, model = parts
    batch = pack(processor, [[A, B], [C]])
    flex = attending(model, "flex_attention")
    assert flex.language_model.get_decoder().config._attn_implementation == "flex_attention"
    with torch.no_grad(), torch.compiler.set_stance(stance):
        found, expected = flex(**batch), model(**batch)
    torch.testing.assert_close(found.document_loss_sums, expected.document_loss_sums, rtol=1e-5, atol=0)


def test_what_cannot_keep_documents_apart_is_refused(parts, tmp_path):
    processor, model = parts
    batch = pack(processor, [[A, B]])
    other = copy.deepcopy(model)
    other.language_model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(
        ConfigError, match=r"'paged\|sdpa' is not known .* eager, flash_attention_2, flex_attention, sdpa"
    ):
        other(**batch)
    other = copy.deepcopy(model)
    other.language_model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="llama has linear_attention; use batches that are not packed"):
        other(**batch)
    with pytest.raises(DataError, match="neither a cache nor position_ids"):
        model(**batch, position_ids=document_positions(batch["segment_ids"]))
    batch.pop("labels")
    with pytest.raises(DataError, match="neither a cache nor position_ids"):
        model.generate(**batch, max_new_tokens=2)


def test_a_recurrent_llm_is_refused(tmp_path):
    llm = {"model_type": "mamba", "state_size": 4, "num_hidden_layers": 1}
    spec = tiny_spec(tmp_path, llm=llm)
    processor = build_processor(spec)
    model = build_model(spec, processor)
    with pytest.raises(ConfigError, match="mamba has a recurrent state"):
        model(**pack(processor, [[A, B]]))
