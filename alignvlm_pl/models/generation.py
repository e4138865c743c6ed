"""Settings of `generate` for prompts with images: which are refused, and what stands at the placeholders meanwhile.

transformers looks the ids of prompts and settings up in the logits, outside of which the placeholder's id may lie.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..errors import ConfigError

_INDEX_LOGITS = """bad_words_ids begin_suppress_tokens forced_bos_token_id forced_eos_token_id sequence_bias
suppress_tokens""".split()


def merged_settings(default: Any, given: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a call: its options over the configuration given, which must be one, over the model's.

    Raises a ConfigError where the configuration given is none.
    """
    if isinstance(given, (Mapping, str)):
        raise ConfigError(f"generate: generation_config is a {type(given).__name__}, expected a GenerationConfig")
    chosen = {name: value for name, value in vars(given or default).items() if value is not None}
    return {**vars(default), **chosen, **options}


def check_settings(settings: Mapping[str, Any], *, image_token_id: int, vocabulary: int) -> None:
    """Raise a `ConfigError` if a setting of a call is not supported, or has an id that is never generated."""
    # These cut prompts or models apart without regard to images.
    for name in ("assistant_early_exit", "prefill_chunk_size", "token_healing"):
        if settings.get(name):
            raise ConfigError(f"generate: {name} is not supported by this model; leave it out")
    for name in (*_INDEX_LOGITS, "eos_token_id", "pad_token_id"):
        ids = _token_ids(settings.get(name), is_bias=name == "sequence_bias")
        # An end or padding that the LLM does not have is never looked up.
        kept = ids if name in _INDEX_LOGITS else (token for token in ids if token == image_token_id)
        _require_known(name, kept, image_token_id, vocabulary)


def checked_prefix(allowed: Callable[..., Any], *, image_token_id: int, vocabulary: int) -> Callable[..., Any]:
    """Return a `prefix_allowed_tokens_fn` that raises a `ConfigError` for an id that is never generated."""

    def checked(*arguments: Any) -> Any:
        tokens = allowed(*arguments)
        _require_known("prefix_allowed_tokens_fn", _token_ids(tokens), image_token_id, vocabulary)
        return tokens

    return checked


def _require_known(name: str, ids: Iterator[int], image_token_id: int, vocabulary: int) -> None:
    for token in ids:
        if token >= vocabulary:
            what = "the image placeholder's id" if token == image_token_id else "the id"
            raise ConfigError(
                f"generate: {name} has {what} {token}, expected ids that can be generated, 0 to {vocabulary - 1}; "
                "leave it out"
            )


def _token_ids(value: Any, *, is_bias: bool = False) -> Iterator[int]:
    """Yield the ids of a setting: of a number, of lists, tensors and keys of any depth, of pairs (ids, bias)."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset, range, Mapping)):
        for one in value:
            yield from _token_ids(one[:1] if is_bias and isinstance(one, list) else one)


def real_tokens(prompt: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return the attention mask (B, L) of a prompt that came without one: 0 at the id of padding."""
    pad = next(_token_ids(settings.get("pad_token_id")), None)
    ends = set(_token_ids(settings.get("eos_token_id")))
    return torch.ones_like(prompt) if pad is None or pad in ends else prompt.ne(pad).to(prompt.dtype)


def fill(prompt: Tensor, mask: Tensor, attention_mask: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
    """Return a prompt (B, L) that has the row's first id of text that ends no answer where `mask` is true.

    Penalties on the ids of a prompt stay the same then. In a chat it is the token that begins a turn, which answers do
    not contain, so that n-grams across an image forbid no word. A row without text has the first id that ends nothing.
    """
    ends = set(_token_ids(settings.get("eos_token_id")))
    text = ~mask & ~torch.isin(prompt, torch.tensor(sorted(ends), dtype=prompt.dtype, device=prompt.device))
    if attention_mask is not None and attention_mask.shape == prompt.shape:
        text &= attention_mask.bool()
    first = prompt.gather(1, text.long().argmax(dim=1, keepdim=True))
    other = next(token for token in range(len(ends) + 1) if token not in ends)
    return torch.where(mask, first.masked_fill(~text.any(dim=1, keepdim=True), other), prompt)


def shortened_limits(settings: Mapping[str, Any], dropped: int) -> dict[str, Any]:
    """Return the lengths among the settings that count the prompt, for one that is shorter by `dropped` tokens."""
    defaults = GenerationConfig()
    lengths = {name: settings.get(name) for name in ("max_length", "min_length")}
    return {name: value - dropped for name, value in lengths.items() if value and value != getattr(defaults, name)}


def with_prompt(sequences: Tensor, prompt: Tensor, length: int) -> Tensor:
    """Return sequences (n · B, …) with the prompts (B, L) in place of their first `length` tokens."""
    repeated = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0)
    return torch.cat([repeated.to(sequences), sequences[:, length:]], dim=1)


class PromptStreamer(BaseStreamer):
    """A streamer that hands on to the caller's; first the prompt as it was given."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.to(value), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
