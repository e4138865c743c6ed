"""`align`: one function, several back-ends.

| back-end | for | memory |
| --- | --- | --- |
| eager | few scores; the definition | several (N, V) arrays |
| chunked | any device | two (chunk, V) arrays, computed again in backward |
| triton | CUDA | as chunked; norm and softmax in fused kernels |

`auto` takes eager where the scores are small, triton on CUDA where it is installed, else chunked.
"""

import os
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, nearest
from .chunked import mix_chunked
from .eager import mix_eager
from .mixture import Mixture

AUTO = "auto"
_SMALL_BYTES = 64 << 20
"""Scores (N, V) in float32 below this: `auto` keeps them, computing them again would cost more than it saves."""


class Backend(Protocol):
    """What every back-end is called with; see `align_read`."""

    def __call__(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        gain: Tensor,
        bias: Tensor,
        table: Tensor | None,
        *,
        eps: float,
        columns: Tensor | None = None,
    ) -> Mixture: ...


BACKENDS: dict[str, Backend] = {
    "eager": mix_eager,
    "chunked": mix_chunked,
    "triton": partial(mix_chunked, kernels="triton"),
}


def align(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = AUTO,
) -> Tensor:
    """softmax(LayerNorm(W2 · h) · gain + bias) · E_text (paper, equations 1 and 2).

    Row-sharded weights (DTensor) are gathered, as FSDP gathers a module's parameters when it runs: the norm needs all
    rows of the vocabulary. Their gradients are scattered again.

    Args:
        hidden: (N, D) after W1 and its norm. Its dtype, or autocast's, is that of the matrix products.
        head_weight: W2, (V, D).
        gain: (V,) of the vocabulary norm.
        bias: (V,) likewise.
        table: E_text, (V, D).
        eps: Epsilon of the vocabulary norm.
        backend: `auto`, or a name of `BACKENDS`.

    Returns:
        (N, D) in the table's dtype, or autocast's.

    Raises:
        ConfigError: If the back-end is unknown or cannot run here, or the shapes do not fit.
    """
    embeds = _mix(hidden, head_weight, gain, bias, table, None, eps, backend).embeds
    assert embeds is not None, "there is a table"
    return embeds


def align_read(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    columns: Tensor,
    eps: float = 1e-5,
    backend: str = AUTO,
) -> Mixture:
    """As `align`, and the log-probabilities of some columns; only these leave the pass over the vocabulary.

    Args:
        hidden: (N, D).
        head_weight: (V, D).
        gain: (V,).
        bias: (V,).
        table: (V, D); None leaves the mixing of embeddings out.
        columns: Ids of the columns to read.
        eps: Epsilon of the vocabulary norm.
        backend: `auto`, or a name of `BACKENDS`.

    Raises:
        ConfigError: As `align`.
    """
    return _mix(hidden, head_weight, gain, bias, table, columns, eps, backend)


def check_backend(name: str) -> str:
    """Return the name.

    Raises:
        ConfigError: If there is no such back-end.
    """
    if name != AUTO and name not in BACKENDS:
        raise ConfigError(f"connector backend {name!r} is unknown: {nearest(str(name), (AUTO, *BACKENDS))}")
    return name


def choose_backend(name: str, *, device: torch.device, scores: int) -> str:
    """Name of the back-end to take.

    Args:
        name: What was asked for.
        device: Where the tensors are.
        scores: N · V.

    Raises:
        ConfigError: If there is no such back-end, or it cannot run on this device.
    """
    check_backend(name)
    if name == AUTO:
        if 4 * scores < _SMALL_BYTES:
            return "eager"
        return "triton" if device.type == "cuda" and _has_triton() else "chunked"
    if name == "triton":
        if device.type != "cuda" and not _interpreted():
            raise ConfigError(
                f"connector backend 'triton' needs a CUDA device, the tensors are on {str(device)!r}; set backend: "
                "chunked (any device) or auto"
            )
        if not _has_triton():
            raise ConfigError(
                "connector backend 'triton': the package triton is not installed; `pip install triton`, or set "
                "backend: chunked or auto"
            )
    return name


def gathered(weight: Tensor) -> Tensor:
    """All rows of a weight that may be row-sharded (DTensor); its gradient is scattered again."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _mix(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    columns: Tensor | None,
    eps: float,
    backend: str,
) -> Mixture:
    _check_shapes(hidden, head_weight, gain, table)
    name = choose_backend(backend, device=hidden.device, scores=hidden.shape[0] * head_weight.shape[0])
    return BACKENDS[name](
        hidden,
        gathered(head_weight),
        gathered(gain),
        gathered(bias),
        None if table is None else gathered(table),
        eps=eps,
        columns=columns,
    )


def _check_shapes(hidden: Tensor, head_weight: Tensor, gain: Tensor, table: Tensor | None) -> None:
    if hidden.shape[-1] != head_weight.shape[1]:
        raise ConfigError(
            f"ALIGN: visual tokens have width {hidden.shape[-1]}, W2 has {head_weight.shape[1]}; both are the LLM's"
        )
    counts = {"W2": head_weight.shape[0], "the vocabulary norm": gain.shape[0]}
    if table is not None:
        counts["the embedding table"] = table.shape[0]
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(
            f"ALIGN needs as many rows everywhere: {found}; a padded table is cut to the rows kept"
        )


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"
