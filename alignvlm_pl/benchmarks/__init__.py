"""Benchmarks and their registry by name. Nothing here needs torch.

Those of the AlignVLM paper (arXiv 2502.01341) are in `published.yaml`; every `Benchmark` that a file of this folder
defines is registered, too: to add one, add a file (docs/extend/benchmark.md).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from alignvlm_pl.errors import require_known
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.pope import split_categories
from alignvlm_pl.utils.registry import instances_in, load_instance

from .base import Benchmark, Prompt, Scoring, SourceFile, plain_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Prompt", "Scoring", "get_benchmark", "load_benchmark", "plain_benchmark"]


def _source(
    vlmevalkit: str = "", docdownstream: str = "", url: str = "", folder: str = "VLMEval", **fields: Any
) -> SourceFile:
    """Return a source by its name at VLMEvalKit or in DocDownstream, or by its URL."""
    fields["md5"] = tuple(fields.get("md5", ()))
    if docdownstream:
        hub = "https://huggingface.co/datasets/mPLUG/DocDownstream-1.0"
        return SourceFile(file=f"{docdownstream}_test.jsonl", url=hub, format="docdownstream", **fields)
    url = url or f"https://opencompass.openxlab.space/utils/{folder}/{vlmevalkit}.tsv"
    return SourceFile(file=url.rpartition("/")[2], url=url, format="vlmevalkit-tsv", **fields)


def _benchmark(name: str, *, metric: str, rules: list[str] | None = None, **fields: Any) -> Benchmark:
    """Return a benchmark; predictions have up to 64 tokens."""
    made: dict[str, Any] = {
        "scorings": (Scoring(metric=metric, rules=tuple(rules or ())),),
        "sources": tuple(_source(**source) for source in fields.pop("sources")),
        "prompt": Prompt(**fields.pop("prompt", {})),
        "prompts": {part: Prompt(**prompt) for part, prompt in fields.pop("prompts", {}).items()},
    }
    return Benchmark(name=name, **{"max_new_tokens": 64, **fields}, **made)


def _categories(sample: EvalSample) -> int:
    """Return the number of questions that a prediction of POPE counts as: one per category, which are stored once."""
    return len(split_categories(sample)) or 1


_FIELDS = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
PUBLISHED = {name: _benchmark(name, **fields) for name, fields in _FIELDS.items()}
PUBLISHED["pope"] = replace(PUBLISHED["pope"], count=_categories)
BENCHMARKS = PUBLISHED | instances_in(__name__, __path__, Benchmark)


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name, or a ConfigError; a name may come from data: import paths are not followed."""
    require_known(name, BENCHMARKS, f"there is no benchmark {name!r}")
    return BENCHMARKS[name]


def load_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name, or of the import path of a `Benchmark`, such as `mypackage.benchmarks.INVOICES`.

    Raises:
        ConfigError: There is none of this name, or the path names something else.
    """
    return load_instance(name, BENCHMARKS, Benchmark)
