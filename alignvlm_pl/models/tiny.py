"""A random AlignVLM for tests: byte tokenizer, SigLIP with 16 tokens per tile, Llama; no download."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..preprocessing.chat import CHATML_TEMPLATE
from .build import Backbone, ModelSpec

TILE_PX = 56
PATCH_PX = 14
TOKENS_PER_TILE = (TILE_PX // PATCH_PX) ** 2

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_BYTES = 256
VOCAB_SIZE = NUM_BYTES + len(CONTROL_TOKENS)
"""Rows of the LLM's table. The processor's `<image>` gets the next id, outside the table."""


def tiny_tokenizer(*, chat_template: str | None = CHATML_TEMPLATE) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes and the control tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_vision(*, width: int = 32, layers: int = 2, **fields: Any) -> dict[str, Any]:
    """Configuration of a small SigLIP; `fields` override or add settings."""
    return {
        "model_type": "siglip_vision_model",
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        **fields,
    }


def tiny_llm(*, width: int = 64, layers: int = 2, tied: bool = True, **fields: Any) -> dict[str, Any]:
    """Configuration of a small Llama; `fields` override or add settings."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": NUM_BYTES + 1,
        "eos_token_id": NUM_BYTES + 2,
        "pad_token_id": NUM_BYTES,
        **fields,
    }


def tiny_spec(
    folder: str | Path,
    *,
    connector: dict[str, Any] | None = None,
    tied: bool = True,
    vision_feature: str = "last_normed",
    tiling: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    llm: dict[str, Any] | None = None,
) -> ModelSpec:
    """Return the specification of a random tiny AlignVLM, and write its tokenizer into `folder`.

    `tiling` overrides tiles of 56 x 56 px, at most 4 of them; `vision` and `llm` override `tiny_vision` and `tiny_llm`.
    The others are those of `ModelSpec`, with ALIGN by default.
    """
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(
        vision=Backbone(config=tiny_vision(**(vision or {}))),
        llm=Backbone(config=tiny_llm(tied=tied, **(llm or {})), tokenizer=str(folder)),
        connector=dict(connector or {"type": "align"}),
        tiling={"tile_height": TILE_PX, "tile_width": TILE_PX, "max_tiles": 4, **(tiling or {})},
        vision_feature=vision_feature,
    )
