"""Perplexity of text against transformers' own loss."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignvlm_pl.models.tiny import tiny_llm
from alignvlm_pl.study.forgetting import perplexity


def test_perplexity_is_transformers_loss():
    from transformers import AutoConfig

    torch.manual_seed(0)
    fields = tiny_llm()
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    ids = torch.randint(0, 256, (3, 40))
    with torch.no_grad():
        loss = float(llm(input_ids=ids, labels=ids).loss)
    assert perplexity(llm, ids) == pytest.approx(math.exp(loss), rel=1e-5)
