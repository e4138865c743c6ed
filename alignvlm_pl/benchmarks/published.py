"""The benchmarks of the AlignVLM paper (arXiv 2502.01341), which `published.yaml` describes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.pope import split_categories

from .base import Benchmark, Prompt, Scoring, SourceFile


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
