"""The options that transformers hands to a processor: each is honoured, or refused by its name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, nearest, require_known
from ..preprocessing.tiling import Tiling

_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs", "videos_kwargs", "audio_kwargs")
_TEXT = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "return_attention_mask")
_TILING = ("max_tiles", "max_side", "rule", "thumbnail", "covering_threshold")
"""Fields of `Tiling` that one call may change: the size of a tile is the model's."""
_NEVER_DONE = """add_special_tokens return_token_type_ids return_mm_token_type_ids return_text_replacement_offsets
return_overflowing_tokens return_special_tokens_mask return_offsets_mapping return_length is_split_into_words"""
_ALWAYS_DONE = "do_convert_rgb do_resize do_rescale do_normalize do_pad"
_ALWAYS = {**dict.fromkeys(_NEVER_DONE.split(), False), **dict.fromkeys(_ALWAYS_DONE.split(), True)}

_PADDING = {True: "longest", False: "do_not_pad"}
_TRUNCATION = {True: "longest_first", False: "do_not_truncate", "only_first": "longest_first"}
_UNLIMITED = 10**9
"""A tokenizer without a limit says 10**30."""

_LONGEST = 1 << 24
"""Tokens that a batch is padded to, at most: above, memory ends first."""

_HUB = """attn_implementation cache_dir code_revision device device_map dtype force_download gguf_file local_files_only
low_cpu_mem_usage max_memory mirror offload_folder proxies quantization_config resume_download return_unused_kwargs
revision subfolder token torch_dtype tp_plan trust_remote_code use_auth_token use_safetensors variant"""
_TOKENIZER = """add_bos_token add_eos_token add_prefix_space additional_special_tokens backend bos_token
clean_up_tokenization_spaces cls_token eos_token extra_special_tokens fix_mistral_regex from_slow legacy mask_token
model_input_names model_max_length name_or_path pad_token padding_side sep_token split_special_tokens tokenizer
tokenizer_file tokenizer_type truncation_side unk_token use_fast"""
_LOADING = frozenset((_HUB + " " + _TOKENIZER).split())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """How a batch is cut, padded and returned, in transformers' names.

    `padding` is `longest`, `max_length` or `do_not_pad`; `return_tensors` is `pt`, `np`, or None for lists. To
    `max_length` rows are padded, and text is cut if `truncation`; visual tokens count and are never cut.
    """

    tiling: Tiling
    padding: str = "longest"
    padding_side: str = "left"
    max_length: int | None = None
    truncation: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    return_attention_mask: bool = True

    def padded_length(self, longest: int) -> int:
        """Return the length of a batch whose longest row is `longest`."""
        length = max(longest, self.max_length or 0) if self.padding == "max_length" else longest
        return -(-length // (self.pad_to_multiple_of or 1)) * (self.pad_to_multiple_of or 1)


def parse_options(given: Mapping[str, Any], *, tiling: Tiling, padding_side: str, longest: int) -> BatchOptions:
    """Return the options of a call of the processor.

    They are `given` flat or in transformers' groups (`text_kwargs`, `images_kwargs`, …); None is the default, but for
    `return_tensors`. The others are the defaults: the processor's, and as `max_length` the `longest` of the tokenizer.

    Raises:
        ConfigError: An option is unknown, given twice, or has a value that is not supported.
    """
    flat = _flatten(given)
    found = {name: flat.pop(name) for name in _TEXT if flat.get(name) is not None}
    changed = {name: flat.pop(name) for name in _TILING if name in flat}
    tensors = flat.pop("return_tensors", "pt")
    for name, value in flat.items():
        if name in _ALWAYS and value not in (None, _ALWAYS[name]):
            raise ConfigError(f"processor: {name}={str(value)[:40]} is not supported; it is always {_ALWAYS[name]}")
        # The last two have no effect: content never writes a control token.
        if value is not None and name not in (*_ALWAYS, "verbose", "sanitize_control_tokens"):
            known = (*_TEXT, *_TILING, "return_tensors")
            raise ConfigError(f"processor: unknown option {str(name)[:60]!r}; {nearest(str(name), known)}")
    padding = _choice("padding", found.pop("padding", True), ("longest", "max_length", "do_not_pad"), _PADDING)
    truncation = found.pop("truncation", found.get("max_length") is not None and padding != "max_length")
    cut = _choice("truncation", truncation, ("longest_first", "do_not_truncate"), _TRUNCATION) == "longest_first"
    if (cut or padding == "max_length") and "max_length" not in found and longest < _UNLIMITED:
        found["max_length"] = longest
    for name in ("max_length", "pad_to_multiple_of"):
        value = found.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"processor: {name}={str(value)[:40]!r}, expected a whole number of at least 1")
        if value > _LONGEST and (padding == "max_length" or name != "max_length"):
            raise ConfigError(f"processor: rows padded to {name}={value}, expected at most {_LONGEST} tokens")
    if not isinstance(found.get("return_attention_mask", True), bool):
        raise ConfigError(f"processor: return_attention_mask={str(found['return_attention_mask'])[:40]!r} is no bool")
    if padding == "max_length" and "max_length" not in found:
        raise ConfigError("processor: padding='max_length' needs max_length; the tokenizer has no limit of its own")
    side = _choice("padding_side", found.pop("padding_side", padding_side), ("left", "right"))
    return BatchOptions(
        tiling=dataclasses.replace(tiling, **changed) if changed else tiling,
        padding=padding,
        padding_side=side,
        truncation=cut and "max_length" in found,
        return_tensors=None if tensors is None else _choice("return_tensors", tensors, ("pt", "np")),
        **found,
    )


def require_loading_options(given: Mapping[str, Any], own: tuple[str, ...], *, what: str) -> None:
    """Raise a `ConfigError` if `from_pretrained` has an option that neither `what`, the tokenizer nor the hub has."""
    unknown = [name for name in given if name not in own and name not in _LOADING and not name.startswith("_")]
    if unknown:
        raise ConfigError(f"{what}.from_pretrained: unknown option {unknown[0][:60]!r}; {nearest(unknown[0], own)}")


def require_mapping(name: str, options: Any) -> Mapping[str, Any]:
    """Return a group of options, empty for None; raise a `ConfigError` if it is none."""
    if not isinstance(options, (Mapping, type(None))):
        raise ConfigError(f"processor: {name} is of type {type(options).__name__}, expected a dict of options")
    return options or {}


def _flatten(given: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: _plain(name, value) for name, value in given.items() if name not in _GROUPS}
    for group in _GROUPS:
        options = require_mapping(group, given.get(group))
        if group in ("videos_kwargs", "audio_kwargs") and options:
            raise ConfigError(f"processor: {group} is not supported; the model takes text and images")
        for name, value in options.items():
            value = _plain(name, value)
            if name in flat and flat[name] != value:
                raise ConfigError(f"processor: {name} is given twice, as {flat[name]!r} and in {group} as {value!r}")
            flat[name] = value
    return flat


def _plain(name: Any, value: Any) -> Any:
    """Return the number or text of a scalar of numpy or torch; other values as they are."""
    if not hasattr(value, "ndim"):
        return value
    if value.ndim:
        raise ConfigError(f"processor: {name} is an array of shape {tuple(value.shape)}, expected one value")
    return value.item()


def _choice(name: str, value: Any, known: tuple[str, ...], spellings: Mapping[Any, str] | None = None) -> str:
    """Return the value as one of `known`; enums of transformers are strings."""
    text = (spellings or {}).get(value, value) if isinstance(value, (bool, str)) else value
    text = getattr(text, "value", text)
    require_known(text, known, f"processor: {name}={str(value)[:40]!r}")
    return str(text)
