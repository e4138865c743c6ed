"""The converted SmolLM2: every weight present, and it still answers. Skipped without the package."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignvlm_pl.pretrained.cache import cache_dir, is_complete
from alignvlm_pl.pretrained.smollm2 import SMOLLM2, ensure_smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(SMOLLM2.module) is None
        and not is_complete(cache_dir() / SMOLLM2.folder_name, source=SMOLLM2),
        reason=f"no weights: {SMOLLM2.install_command}",
    ),
]


@pytest.fixture(scope="module")
def folder():
    """The user's own converted copy: 538 MB are not written for a test when they are there already."""
    return ensure_smollm2()


def test_the_folder_loads_without_missing_weights(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.num_parameters() == 134_515_008


def test_the_model_answers_through_its_chat_template(folder):
    """Wrongly un-permuted queries or keys still load, but answer with noise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
