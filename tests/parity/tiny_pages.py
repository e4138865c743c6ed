"""Tiny random models whose answers depend on the image, and batches of three pages for them."""

import numpy as np
import torch
from PIL import Image

from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.pixels import normalise_tensor
from alignvlm_pl.models.tiny import tiny_spec

INPUTS = ("input_ids", "attention_mask", "pixel_values", "tile_boxes", "num_tiles")


def make(folder, *, sharp=True, **options):
    """A processor and a model whose answers depend on the image: random weights hardly differ in scores otherwise."""
    torch.manual_seed(0)
    spec = tiny_spec(folder, **options)
    processor = build_processor(spec)
    model = build_model(spec, processor).eval()
    if sharp:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name:
                    parameter.mul_(8.0 if "language_model" in name else 3.0)
    return processor, model


def save(folder, **options):
    """Save such a model with its processor; returns the folder."""
    for one in make(folder, **options):
        one.save_pretrained(folder / "hf")
    return folder / "hf"


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SAMPLES = (
    ("What?", "12", (120, 60)),
    ("And what is the total of all?", "yes, 7", (40, 50)),
    ("Why", "no", (60, 130)),
)


def encode(processor, index, *, generation=False):
    question, answer, size = SAMPLES[index]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if not generation:
        messages.append({"role": "assistant", "content": answer})
    return processor.encode(messages, [picture(*size, index)], generation=generation)


def batch_of(processor, indices, *, generation=False):
    items = [encode(processor, index, generation=generation) for index in indices]
    return processor.collate(items, pad_left=generation)


def inputs_of(batch):
    return {key: batch[key] for key in INPUTS}


def tiles_of(batch):
    return normalise_tensor(batch["pixel_values"], batch["tile_boxes"])


@torch.no_grad()
def greedy_without_cache(model, batch, steps):
    """Arg-max of the whole forward, one token longer each time; one sample, no padding."""
    ids = batch["input_ids"]
    for _ in range(steps):
        inputs = {**inputs_of(batch), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, batch["input_ids"].shape[1] :]
