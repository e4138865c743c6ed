"""Whether Triton's kernels run on a device, and if not, what is missing.

Triton compiles its launcher on the machine that runs it, with a C compiler and Python's headers, which compute nodes
and slim images often lack. Found here on 16 rows, before the first step, and not as a traceback inside of it.
"""

import os
import shutil
import sysconfig
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from . import norm_softmax
from .norm_softmax import NormGradients, VocabularyNorm

_ROWS, _COLUMNS = 16, 64


def is_triton_device(kind: str) -> bool:
    """Return whether Triton's kernels are for devices of this kind; its interpreter runs them on a CPU, for tests."""
    return kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def triton_runs(kind: str, index: int | None) -> bool:
    """Return whether the kernels run on the device `kind:index`; if not, warn once on each node and say why."""
    reason = why_not_triton(kind, index)
    if reason is not None and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        _warn(reason)
    return reason is None


@torch.compiler.assume_constant_result
def why_not_triton(kind: str, index: int | None) -> str | None:
    """Return None if the kernels run on the device `kind:index`, else what is missing."""
    return _probe(torch.device(kind) if index is None else torch.device(kind, index))


@cache
def _probe(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed (`pip install triton`)"
    try:
        error = _compare(device)
    except Exception as failure:  # whatever a compiler, a driver or an import raises here, the plain kernels run
        first = (str(failure).strip() or "no message").splitlines()[0]
        return f"{_missing_tool() or 'its kernels do not compile'} ({type(failure).__name__}: {first[:200]})"
    if not error < 1e-3:
        return f"its kernels give other numbers than plain torch on {device} (difference {error:.1e})"
    return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"connector backend auto takes 'chunked', not 'triton': {reason}", stacklevel=2)


def _compare(device: torch.device) -> float:
    """Run forward and backward kernels on small arrays; return the largest difference from plain torch."""
    from . import norm_softmax_triton

    made = torch.Generator().manual_seed(0)
    scores, upstream = torch.randn(2, _ROWS, _COLUMNS, generator=made).to(device)
    gain, bias = torch.randn(2, _COLUMNS, generator=made).to(device)
    norm = VocabularyNorm(gain, bias, 1e-5)
    results = []
    for kernels in (norm_softmax, norm_softmax_triton):
        weights, grad_scores, grad_weights = scores.clone(), scores.clone(), upstream.clone()
        total = NormGradients(torch.zeros_like(norm.gain), torch.zeros_like(norm.bias))
        kernels.norm_softmax_(weights, norm, None)
        kernels.norm_softmax_backward_(grad_scores, grad_weights, norm, total, None, None)
        results.append(torch.cat([weights.flatten(), grad_scores.flatten(), total.gain, total.bias]))
    return float((results[0] - results[1]).abs().max())


def _missing_tool() -> str | None:
    """Return what Triton needs to compile its launcher and this machine does not have."""
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC", "").strip() else ["gcc", "clang"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C compiler: {' or '.join(compilers)} is not on PATH; install one, or set CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h is missing: install Python's headers (python3-dev)"
    return None
