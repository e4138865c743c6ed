"""How often a micro batch waits for the device: operators whose result the host must read before it continues."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.preprocessing.batch import with_steps
from alignvlm_pl.training.module import AlignVLMModule, loss_inputs
from alignvlm_pl.training.stage import Stage
from datamodules.loading.collate import Collator
from datamodules.shards.sample import Sample

SIZE_OF_RESULT = {"nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "masked_scatter_backward"}
VALUE = {"_local_scalar_dense", "is_nonzero", "equal"}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """The operators that wait for a GPU, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name in BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in SIZE_OF_RESULT | VALUE or by_mask or sized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Loop:
    """What the module asks its Trainer in a training step: one micro batch of a step, on one rank, not logged."""

    accumulate_grad_batches, world_size, num_training_batches, log_every_n_steps, global_step = 1, 1, 9, 50, 3

    class strategy:
        reduce = staticmethod(lambda value, reduce_op: value)


def sample(text: str, tiles: int) -> Sample:
    pixels = np.arange(56 * 56 * tiles * 3) * 11 % 251
    images = [Image.fromarray(pixels.astype(np.uint8).reshape(56, 56 * tiles, 3))] if tiles else []
    content: list[dict[str, Any]] = [{"type": "image", "index": 0}] * len(images)
    question = {"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return Sample(
        key=text,
        source="made",
        task="vqa",
        messages=[question, answer],
        images=images,
        references=[],
        lines=[{"text": text, "box": [4, 4, 20, 16]}] if images else [],
        sizes=[image.size for image in images],
    )


@pytest.fixture
def module(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path, connector={"type": "align", "vocab_keep": list(range(259))}))
    module.configure_model()
    return module


def make_batches(module):
    """Three samples of unlike lengths: padded, and packed into two rows."""
    collator = Collator(processor=module.processor)
    items = [collator.encode(sample(*one)) for one in (("12", 1), ("seven of them", 2), ("no", 0))]
    batches = [collator.collate(items), collator.collate_packed([items[:2], items[2:]])]
    return list(with_steps(batches, 1))


def train(module, loop, batch, **stage):
    module.begin_stage(Stage(**{"name": "all", "lr_vision": 1e-3, "lr_connector": 1e-3, "lr_llm": 1e-3, **stage}))
    module.trainer = loop
    module.zero_grad()
    output = module.training_step(batch, 0)
    output["loss"].backward()
    return output


@pytest.mark.parametrize(
    "stage", [{}, {"readout_weight": 0.5}, {"objective": "read", "lr_llm": None}], ids=["answer", "readout", "read"]
)
def test_a_micro_batch_waits_for_the_device_once_at_most(module, stage):
    """The one wait is transformers', which looks at the positions of unpacked rows."""
    loop = Loop()  # held here: the module refers to it weakly
    for batch in make_batches(module):
        with Waits() as waits:
            train(module, loop, batch, **stage)
        assert len(waits.found) <= ("segment_ids" not in batch), waits.found


def test_flash_attention_knows_its_bounds(module):
    from alignvlm_pl.models.sequences import packed_arguments

    batch = make_batches(module)[1]
    decoder = module.net.language_model.get_decoder()
    decoder.config._attn_implementation = "flash_attention_2"
    given = {"bounds": batch["document_bounds"], "longest": batch["longest_document"]}
    embeds = torch.zeros(*batch["segment_ids"].shape, 8)
    with Waits() as waits:
        found = packed_arguments(decoder, embeds, batch["segment_ids"], **given)
    assert waits.found == []
    expected = packed_arguments(decoder, embeds, batch["segment_ids"])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"):
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))


def test_positions_of_the_batch_give_what_the_model_finds_itself(module):
    loop = Loop()
    for batch in make_batches(module):
        results = []
        for own in (batch, {name: value for name, value in batch.items() if not name.endswith("_positions")}):
            output = train(module, loop, own)
            results.append([*output.values(), *(p.grad.clone() for p in module.net.parameters())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_labels_that_are_removed_after_collation_have_no_loss(module):
    batch = make_batches(module)[0]
    whole = train(module, loop := Loop(), batch)["document_supervised"]
    batch["labels"][0] = -100
    output = train(module, loop, batch)
    assert output["document_supervised"].tolist() == [0, *whole.tolist()[1:]]
    assert output["document_loss_sums"][0] == 0
    assert output["loss_sum"] == pytest.approx(float(output["document_loss_sums"].sum()), rel=1e-6)


def attention_masks(monkeypatch):
    """The masks that scaled_dot_product_attention is called with, in order."""
    masks: list[torch.Tensor | None] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, **kwargs):
        if kwargs.get("is_causal") or attn_mask is not None:  # of the LLM; the vision tower's attention is not causal
            masks.append(attn_mask)
        return inner(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return masks


def test_a_padded_batch_has_no_attention_mask(module, monkeypatch):
    masks = attention_masks(monkeypatch)
    batch, layers = make_batches(module)[0], module.net.config.text_config.num_hidden_layers
    assert not batch["attention_mask"].all(), "there is padding"
    train(module, Loop(), batch)
    assert masks == [None] * layers
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.validation_step(batch, 0)
    assert masks == [None] * 2 * layers


def test_losses_and_gradients_without_a_mask_are_those_with_one(module):
    net, batch = module.net.double(), make_batches(module)[0]
    results = []
    for mask in (None, batch["attention_mask"]):
        net.zero_grad()
        output = net(**{**loss_inputs(batch), "attention_mask": mask}, labels=batch["labels"], use_cache=False)
        output.loss_sum.backward()
        results.append([output.loss_sum, *(p.grad for p in net.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_made_by_hand_keeps_its_mask_where_padding_is_on_the_left(module):
    batch = make_batches(module)[0]
    by_hand = {name: value for name, value in batch.items() if not name.endswith("_positions")}
    assert loss_inputs(by_hand)["attention_mask"] is None
    left = {**by_hand, "attention_mask": by_hand["attention_mask"].flip(1)}
    assert loss_inputs(left)["attention_mask"] is left["attention_mask"]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_packed_rows_keep_one_mask_for_all_layers(tmp_path, monkeypatch, bfloat16):
    """Autograd keeps what the layers save; a boolean mask would be turned into another one by each layer."""
    module = AlignVLMModule(tiny_spec(tmp_path, llm={"layers": 4}))
    module.configure_model()
    masks, saved = attention_masks(monkeypatch), []
    batch = make_batches(module)[1]
    length = batch["input_ids"].shape[1]
    assert length % 16, "rows are aligned only if that is seen to"

    def pack(tensor):
        if tensor.shape[-2:] == (length, length):
            saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        train(module, Loop(), batch)
    assert len(masks) == 4
    assert len({id(mask) for mask in masks}) == 1
    assert len(saved) >= 4
    assert len(set(saved)) == 1
    assert masks[0].dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert masks[0].stride(-2) % 16 == 0
