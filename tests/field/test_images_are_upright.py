"""A photo that is stored sideways is seen upright, in whatever form it is given.

sglang#33464 and PR#33449, sglang-omni PR#2113, llama.cpp PR#24196, vggt PR#350: EXIF orientation applied to files, and
not to PIL images.
"""

import io

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.preprocessing.imaging import load_image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_seen_as_its_file(orientation, tmp_path):
    processor = build_processor(tiny_spec(tmp_path / "tokenizer"))
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 150, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    upright = load_image(path)
    assert upright.size == ((40, 150) if orientation > 4 else (150, 40))
    batches = []
    for form in (
        path,
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        Image.open(path),
        upright,
        load_image(upright),
    ):
        parts = [{"type": "image", "image": form}]
        chat = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True)
        call = processor(images=form, text="<|im_start|>user\n<image><|im_end|>\n")
        trained = processor.encode([{"role": "user", "content": parts}], [form], generation=True)
        assert len(trained.input_ids) == chat["input_ids"].shape[1] + len("assistant\n") + 1
        batches += [chat, call]
    for batch in batches[1:]:
        assert batch["input_ids"].tolist() == batches[0]["input_ids"].tolist()
        assert bool((batch["pixel_values"] == batches[0]["pixel_values"]).all())
