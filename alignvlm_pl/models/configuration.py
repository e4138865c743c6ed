"""`AlignVLMConfig`, the Hugging Face configuration."""

from collections.abc import Mapping
from inspect import signature
from numbers import Integral
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..errors import ConfigError, nearest
from ..preprocessing.tiling import Tiling
from .processor_options import require_loading_options

_FIELDS_OF_TRANSFORMERS = """attn_implementation auto_map experts_implementation id2label label2id name_or_path
num_labels quantization_config tie_word_embeddings torch_dtype bos_token_id eos_token_id pad_token_id""".split()
_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
FEATURES = ("last_normed", "last", "penultimate")


class AlignVLMConfig(PretrainedConfig):
    """Configuration of an AlignVLM: vision encoder, connector, LLM and the tiling it was trained with.

    Args:
        vision_config: Configuration (or its dict) of any Hugging Face vision model whose `last_hidden_state` is
            (tiles, tokens, width).
        text_config: Configuration (or its dict) of any causal LM.
        connector: `{"type": name, ...}`; the other keys are options of that connector.
        tiling: Fields of `alignvlm_pl.preprocessing.tiling.Tiling`.
        tokens_per_tile: Visual tokens of one tile in the LLM's sequence.
        image_token_id: Id of the placeholder in `input_ids`. It may lie outside the LLM's vocabulary: embeddings at
            these positions are replaced, never looked up, so the embedding table is not resized.
        vision_feature: Which features the connector reads: `last_normed` (`last_hidden_state`), `last` (the last
            layer before the final norm) or `penultimate`. Unused layers are removed.
    """

    model_type = "alignvlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        connector: dict[str, Any] | None = None,
        tiling: dict[str, Any] | None = None,
        tokens_per_tile: int = 729,
        image_token_id: int = 0,
        vision_feature: str = "last_normed",
        **kwargs: Any,
    ) -> None:
        # A saved configuration has it, perhaps with fields of a later release.
        if "transformers_version" not in kwargs:
            known = {*PretrainedConfig().to_dict(), *_FIELDS_OF_TRANSFORMERS}
            for name in kwargs.keys() - known:
                raise ConfigError(f"AlignVLMConfig: unknown field {name[:60]!r}; {nearest(name, self._fields())}")
        self.vision_config = _sub_config("vision_config", vision_config, "siglip_vision_model")
        self.text_config = _sub_config("text_config", text_config, "llama")
        if not isinstance(connector, (Mapping, type(None))):
            raise ConfigError(f"connector is {connector!r:.60}, expected a mapping, such as {{'type': 'align'}}")
        self.connector = dict(connector or {"type": "align"})
        self.tiling = Tiling.from_dict(tiling or {}).to_dict()
        self.tokens_per_tile = whole_number("tokens_per_tile", tokens_per_tile, lowest=1)
        self.image_token_id = whole_number("image_token_id", image_token_id, lowest=0)
        if vision_feature not in FEATURES:
            raise ConfigError(f"vision_feature={vision_feature!r} is unknown; {nearest(vision_feature, FEATURES)}")
        self.vision_feature = vision_feature
        # A tied head is tied inside the LLM; the outer model adds no tie.
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        return tuple(name for name in signature(cls.__init__).parameters if name not in ("self", "kwargs"))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a keyword argument that nobody uses is refused, but for `return_unused_kwargs`.

        Raises:
            ConfigError: An option is unknown, or a field has an invalid value.
        """
        require_dtype(kwargs)
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"config.json holds a {type(config_dict).__name__}, expected an object of fields")
        # transformers sets fields after the configuration is made.
        config_dict = {**config_dict, **{name: kwargs.pop(name) for name in cls._fields() if name in kwargs}}
        returned = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if returned:
            return config, unused
        require_loading_options(unused, cls._fields(), what="configuration")
        return config


def config_from_fields(fields: dict[str, Any], *, default: str | None = None) -> PretrainedConfig:
    """Build a Hugging Face configuration from its fields; raise a `ConfigError` if one is invalid, or the `model_type`
    is unknown (`default` if they have none).
    """
    settings = dict(fields)
    model_type = settings.pop("model_type", default)
    if model_type not in CONFIG_MAPPING:
        hint = nearest(str(model_type), CONFIG_MAPPING).split(" known:")[0].split("known:")[0]
        raise ConfigError(f"model_type {model_type!r} is unknown to transformers; {hint}".rstrip("; "))
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the configuration of {model_type!r} is invalid: {reason}; correct the field") from error


def require_dtype(options: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` if `dtype` or `torch_dtype` is given and is not one that weights are loaded in."""
    for name in ("dtype", "torch_dtype"):
        value = options.get(name)
        if not (value is None or isinstance(value, Mapping) or str(value).removeprefix("torch.") in _DTYPES):
            shown = str(value)[:40]
            raise ConfigError(f"from_pretrained: {name}={shown!r}; {nearest(shown, _DTYPES)}")


def whole_number(name: str, value: Any, *, lowest: int) -> int:
    """Return a field as an int; raise a `ConfigError` if it is no whole number from `lowest` to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not lowest <= int(value) < 1 << 31:
        raise ConfigError(f"{name}={value!r:.60}, expected a whole number of at least {lowest}, below 2^31")
    return int(value)


def _sub_config(name: str, config: Any, default: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    if not isinstance(config, (Mapping, type(None))):
        raise ConfigError(f"{name} is {config!r:.60}, expected a configuration of transformers or its fields")
    return config_from_fields(dict(config or {}), default=default)
