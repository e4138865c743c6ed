"""`align`: one operator, several back-ends.

| back-end | for | memory |
| --- | --- | --- |
| eager | few scores; the reference | several (N, V) arrays |
| chunked | any device | two (chunk, V) arrays, recomputed in backward |
| triton | CUDA | as chunked; norm and softmax in fused kernels |

`auto` chooses eager for few scores, triton on CUDA where its kernels compile and run, else chunked.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError, nearest
from .chunked import align_chunked
from .reference import AlignOutput, align_reference
from .triton_probe import is_triton_device, triton_runs, why_not_triton

AUTO = "auto"
_SMALL_BYTES = 64 << 20
"""Size of the float32 scores (N, V) below which `auto` keeps them: recomputing would cost more than it saves."""

BACKENDS: dict[str, Callable[..., AlignOutput]] = {
    "eager": align_reference,
    "chunked": align_chunked,
    "triton": partial(align_chunked, kernels="triton"),
}
"""Each takes the arguments of `align` but for `backend`; `eager` takes no `budget`."""


def align(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    columns: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = AUTO,
    budget: int | None = None,
) -> AlignOutput:
    """softmax(LayerNorm(W2 · h) · gain + bias) · E_text (paper, equations 1 and 2), and log P_vocab of some columns.

    Row-sharded weights (DTensor) are gathered, because the norm needs all rows of the vocabulary; their gradients are
    scattered again.

    `hidden` (N, D) are the states after W1 and its norm; the matrix products run in their dtype, or autocast's.
    `head_weight` (V, D) is W2; `gain` (V,), `bias` (V,) and `eps` are those of the vocabulary norm. `table` (V, D) is
    E_text, `columns` (C,) are the rows of the vocabulary whose log-probabilities to return: others are never stored.
    `backend` is `auto`, or a key of `BACKENDS`; `budget` are the bytes of the two arrays (chunk, V) that `chunked` and
    `triton` use, by default `default_budget`.

    Returns:
        `embeds` (N, D) in the table's dtype, or autocast's; `log_probs` (N, C) in at least float32. None without a
        table, or without columns.

    Raises:
        ConfigError: If the back-end is unknown or cannot run here, or the shapes do not match.
    """
    _check_shapes(hidden, head_weight, gain, table)
    name = choose_backend(backend, device=hidden.device, scores=hidden.shape[0] * head_weight.shape[0])
    weights = [None if weight is None else full_weight(weight) for weight in (head_weight, gain, bias, table)]
    chunks = {} if budget is None or name == "eager" else {"budget": budget}
    return BACKENDS[name](hidden, *weights, eps=eps, columns=columns, **chunks)


def check_align_backend(name: str) -> str:
    """Return `name`; raise a `ConfigError` if it is neither `auto` nor a key of `BACKENDS`."""
    if name != AUTO and name not in BACKENDS:
        raise ConfigError(f"connector backend {name!r} is unknown; {nearest(str(name), (AUTO, *BACKENDS))}")
    return name


def choose_backend(name: str, *, device: torch.device, scores: int) -> str:
    """Resolve a configured back-end to a key of `BACKENDS`, for N · V `scores`; raise a `ConfigError` if it is none, or
    cannot run on this device.
    """
    check_align_backend(name)
    if name == AUTO:
        if 4 * scores < _SMALL_BYTES:
            return "eager"
        return "triton" if device.type == "cuda" and triton_runs(device.type, device.index) else "chunked"
    if name == "triton":
        if not is_triton_device(device.type):
            raise ConfigError(
                f"connector backend 'triton' needs a CUDA device, the tensors are on {str(device)!r}; set backend: "
                "chunked (any device) or auto"
            )
        if reason := why_not_triton(device.type, device.index):
            raise ConfigError(f"connector backend 'triton': {reason}; or set backend: chunked or auto")
    return name


def full_weight(weight: Tensor) -> Tensor:
    """Return all rows of a weight that may be row-sharded (DTensor), a collective; gradients are scattered again."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _check_shapes(hidden: Tensor, head_weight: Tensor, gain: Tensor, table: Tensor | None) -> None:
    if hidden.shape[-1] != head_weight.shape[1]:
        raise ConfigError(
            f"ALIGN: visual tokens have width {hidden.shape[-1]}, W2 has {head_weight.shape[1]}; both are the LLM's"
        )
    parts = {"W2": head_weight, "the vocabulary norm": gain, "the embedding table": table}
    counts = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(f"ALIGN needs as many rows everywhere: {found}; a padded table is cut to the rows kept")
