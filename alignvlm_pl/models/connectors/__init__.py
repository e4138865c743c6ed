"""Connectors: vision features of a tile in, tokens of the LLM's width out.

The `Connector` that a file of this folder defines is registered under the file's name (docs/extend/connector.md);
`align` is in `models/align.py`.

A connector is an `nn.Module` with

- `forward(features (tiles, tokens, d), table (V, D), *, columns=None) -> ConnectorOutput`;
- `tokens_per_tile(tokens) -> int`: number of output tokens for a tile of `tokens` vision tokens;
- `initialize(head_weight)`, called with the LM head (V, D) at construction and after pretrained weights are loaded;
- `reads_text`: whether its weights are probabilities of text tokens (see `alignvlm_pl.models.page_readout`);
- `keeps_places`, true where it is not there: whether outputs that are as many as the inputs are at their places.

Its constructor takes `vision_dim` (width d of the vision features), `text_dim` (width D of the LLM), `vocab_size` (rows
V of its table) and keyword options, which are the keys of `connector:` in a config beside `type`; a keyword `grid`
receives the rows and columns of the tokens of a tile. `base.Connector` implements all of this but the projection.
"""

import inspect
from typing import Any

from torch import nn

from ...errors import ConfigError, require_known
from ...utils.registry import defined_in, import_path
from ..align import AlignConnector
from .base import Connector
from .grid import TokenGrid, shuffled_grid


def _defined() -> dict[str, type[nn.Module]]:
    found: dict[str, type[nn.Module]] = {"align": AlignConnector}
    for module, value in defined_in(__name__, __path__):
        defined_here = isinstance(value, type) and value.__module__ == module.__name__
        if defined_here and issubclass(value, Connector) and not inspect.isabstract(value):
            found[module.__name__.rpartition(".")[2]] = value
    return found


CONNECTORS: dict[str, type[nn.Module]] = _defined()
PIXEL_SHUFFLE = "pixel_shuffle"
"""Option of every connector: factor of the pixel shuffle of its input."""
_GRID = "grid"
_NO_IDENTITY = ("backend", "budget_gib", "collapse", "gain_init", "init_std", "start", "vocab_keep", "vocab_rows")


def connector_class(name: Any) -> type[nn.Module]:
    """Return the connector of a key of `CONNECTORS`, or of an import path such as `mypackage.connectors.Average`.

    Raises:
        ConfigError: The type is unknown, the message lists the known ones; or the path names no class of a module.
    """
    if isinstance(name, str) and "." in name:
        found = import_path(name, setting="connector type")
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ConfigError(f"connector type {name!r} is no torch.nn.Module")
        return found
    require_known(name, CONNECTORS, f"connector type {name!r} is unknown")
    return CONNECTORS[name]


def shuffle_factor(options: dict[str, Any]) -> int:
    """Return the factor of the pixel shuffle before the connector, 1 for none; raise a `ConfigError` for others."""
    factor = options.get(PIXEL_SHUFFLE, 1)
    if factor not in (1, 2, 3) or isinstance(factor, bool):
        raise ConfigError(f"connector {PIXEL_SHUFFLE}={factor!r}: expected 1 (none), 2 or 3")
    return int(factor)


def build_connector(
    options: dict[str, Any], *, vision_dim: int, text_dim: int, vocab_size: int, grid: TokenGrid | None = None
) -> nn.Module:
    """Build the connector of `options`: `type`, `pixel_shuffle` and the options of that type; widths as above.

    `grid` has the rows and columns of the vision tokens of a tile, and is None if they form none.

    Raises:
        ConfigError: If the type or an option is unknown (the message lists the known ones), or it needs a grid and
            there is none.
    """
    name = options.get("type", "align")
    kind = connector_class(name)
    keywords = {p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known = sorted({*keywords, PIXEL_SHUFFLE} - {_GRID})
    arguments = {key: value for key, value in options.items() if key not in ("type", PIXEL_SHUFFLE)}
    for key in arguments:
        if key == "collapse" and key not in known:
            raise ConfigError(
                f"connector {name!r} has no P_vocab, which says what visual tokens are blank; use 'align', or set "
                "connector.collapse: null"
            )
        require_known(key, known, f"connector {name!r} has no option {key!r}")
    factor = shuffle_factor(options)
    if grid is None and (factor > 1 or _GRID in keywords):
        raise ConfigError(
            f"connector {name!r} ({PIXEL_SHUFFLE}={factor}) needs vision tokens in rows and columns, but this vision "
            "model has no patch_size; use connector mlp, perceiver or align without pixel_shuffle"
        )
    if _GRID in keywords and grid is not None:
        arguments[_GRID] = shuffled_grid(grid, factor)
    return kind(vision_dim * factor**2, text_dim, vocab_size, **arguments)


def connector_identity(options: dict[str, Any]) -> dict[str, Any]:
    """Return the type and options, with defaults, that determine a connector's output for given weights.

    Left out are options for initialisation and back-end, the kept vocabulary rows, which `load_weights` converts, and
    what the LLM sees of the output (`collapse`), which evaluation may change.
    """
    parameters = inspect.signature(connector_class(options.get("type", "align"))).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != _GRID}
    complete = {"type": "align", PIXEL_SHUFFLE: 1, **defaults, **options}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in complete.items()
        if key not in _NO_IDENTITY
    }
