"""`align` and `align_read`: one operator, several back-ends.

| back-end | for | memory |
| --- | --- | --- |
| eager | few scores; the reference | several (N, V) arrays |
| chunked | any device | two (chunk, V) arrays, recomputed in backward |
| triton | CUDA | as chunked; norm and softmax in fused kernels |

`auto` chooses eager for few scores, triton on CUDA if it is installed, else chunked.
"""

import os
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, nearest
from .chunked import align_chunked
from .reference import AlignOutput, align_reference

AUTO = "auto"
_SMALL_BYTES = 64 << 20
"""Size of the float32 scores (N, V) below which `auto` keeps them: recomputing would cost more than it saves."""


class Backend(Protocol):
    """Signature of a back-end; arguments as in `align_read`."""

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
    ) -> AlignOutput: ...


BACKENDS: dict[str, Backend] = {
    "eager": align_reference,
    "chunked": align_chunked,
    "triton": partial(align_chunked, kernels="triton"),
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

    Row-sharded weights (DTensor) are gathered, because the norm needs all rows of the vocabulary; their gradients are
    scattered again.

    Args:
        hidden: (N, D) hidden states after W1 and its norm. The matrix products run in this dtype, or autocast's.
        head_weight: (V, D) W2.
        gain: (V,) gain of the vocabulary norm.
        bias: (V,) bias of the vocabulary norm.
        table: (V, D) E_text, the text embeddings.
        eps: Epsilon of the vocabulary norm.
        backend: `auto`, or a key of `BACKENDS`.

    Returns:
        (N, D) embeddings in the table's dtype, or autocast's.

    Raises:
        ConfigError: If the back-end is unknown or cannot run here, or the shapes do not match.
    """
    embeds = _dispatch(hidden, head_weight, gain, bias, table, None, eps, backend).embeds
    assert embeds is not None, "a table was given"
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
) -> AlignOutput:
    """As `align`, and also return log P_vocab of some columns; the other columns are never stored.

    Args:
        hidden: (N, D).
        head_weight: (V, D).
        gain: (V,).
        bias: (V,).
        table: (V, D); None to compute log-probabilities only.
        columns: (C,) rows of the vocabulary whose log-probabilities to return.
        eps: Epsilon of the vocabulary norm.
        backend: `auto`, or a key of `BACKENDS`.

    Returns:
        `embeds` (N, D), None without a table; `log_probs` (N, C) in at least float32.

    Raises:
        ConfigError: As `align`.
    """
    return _dispatch(hidden, head_weight, gain, bias, table, columns, eps, backend)


def check_align_backend(name: str) -> str:
    """Return `name` if it is `auto` or a key of `BACKENDS`.

    Raises:
        ConfigError: If it is neither.
    """
    if name != AUTO and name not in BACKENDS:
        raise ConfigError(f"connector backend {name!r} is unknown: {nearest(str(name), (AUTO, *BACKENDS))}")
    return name


def choose_backend(name: str, *, device: torch.device, scores: int) -> str:
    """Resolve a configured back-end to a key of `BACKENDS`.

    Args:
        name: The configured name.
        device: Device of the tensors.
        scores: Number of scores, N · V.

    Raises:
        ConfigError: If there is no such back-end, or it cannot run on this device.
    """
    check_align_backend(name)
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


def full_weight(weight: Tensor) -> Tensor:
    """Return all rows of a weight that may be row-sharded (DTensor); gradients are scattered again."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _dispatch(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    columns: Tensor | None,
    eps: float,
    backend: str,
) -> AlignOutput:
    _check_shapes(hidden, head_weight, gain, table)
    name = choose_backend(backend, device=hidden.device, scores=hidden.shape[0] * head_weight.shape[0])
    return BACKENDS[name](
        hidden,
        full_weight(head_weight),
        full_weight(gain),
        full_weight(bias),
        None if table is None else full_weight(table),
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
        raise ConfigError(f"ALIGN needs as many rows everywhere: {found}; a padded table is cut to the rows kept")


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether `TRITON_INTERPRET` is set, under which kernels run (slowly) on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
