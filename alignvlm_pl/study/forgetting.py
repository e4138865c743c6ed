"""`forgetting`: perplexity of the LLM on text before training and after each stage (arXiv 2605.15300 measures it)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..models.build import ModelSpec, build_model
from ..models.modeling import AlignVLMForConditionalGeneration
from ..models.processing import AlignVLMProcessor
from ..utils.yaml_files import load_yaml
from .measure import Trained, measured
from .plan import Study
from .results import Results
from .tables import table

WINDOW = 256
"""Tokens of text that are read together."""
_DEFAULTS = {"text": None, "windows": 32}


def measure(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Return the name of each stage with its perplexity, first that of the LLM before training.

    Settings: `text`, a file, or null for the topics of Python's own help, which are English and come with any Python;
    `windows`, how many pieces of `WINDOW` tokens are read.
    """
    if settings.keys() - _DEFAULTS.keys():
        raise ConfigError(f"measures.forgetting={dict(settings)}: expected text and windows")
    wanted = {**_DEFAULTS, **settings}
    text = _text(wanted["text"])
    found: list[list[Any]] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AlignVLMProcessor.from_pretrained(trained.stages[-1] / "hf")
    ids = processor.tokenizer(text, return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
    if len(ids) < wanted["windows"] * WINDOW:
        raise DataError(f"measures.forgetting: the text has {len(ids)} tokens, fewer than windows x {WINDOW}")
    ids = ids[: wanted["windows"] * WINDOW].view(-1, WINDOW).to(device)
    start = load_yaml(trained.stages[0] / "config.yaml")["model"]["init_args"]
    spec = ModelSpec.from_fields(start["spec"])
    if not start.get("weights") and spec.llm.pretrained is not None:
        found.append(["before", perplexity(build_model(spec, processor).language_model.to(device), ids)])
    for stage in trained.stages:
        model = AlignVLMForConditionalGeneration.from_pretrained(stage / "hf")
        name = load_yaml(stage / "config.yaml")["stage"]["name"]
        found.append([name, perplexity(model.language_model.to(device), ids)])
    return found


@torch.inference_mode()
def perplexity(language_model: Any, ids: torch.Tensor) -> float:
    """Return the perplexity of a causal LLM on windows of text (n, length): exp of the mean loss of a token."""
    language_model.eval()
    total = 0.0
    for row in ids:
        logits = language_model(input_ids=row[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write a table of the perplexities, means over the seeds."""
    rows = []
    for arm, by_seed in measured(study, "forgetting", results).items():
        tables = [one["measures"]["forgetting"]["found"] for one in by_seed.values()]
        for index, (stage, _) in enumerate(tables[0] if tables else ()):
            values = [one[index][1] for one in tables]
            rows.append([arm, stage, f"{sum(values) / len(values):.2f}", _spread(values), str(len(values))])
    yield "## Forgetting of text\n\n" + table(["arm", "after", "perplexity", "lowest to highest", "seeds"], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _text(path: str | None) -> str:
    if path is not None:
        try:
            return Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"measures.forgetting: {path} cannot be read as text: {error}") from error
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
