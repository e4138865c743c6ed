"""The `Benchmark` type, and what the benchmarks of the other files are made of."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alignvlm_pl.errors import ConfigError, DataError, require_known
from alignvlm_pl.metrics import Metric, get_metric
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.utils.text_files import decode_text

_IMAGE = re.compile(r"<image (\d+)>")

QUESTION = "{question}"
"""Placeholder of the question in a prompt file."""
Format = Literal["vlmevalkit-tsv", "docdownstream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A published file from which `prepare benchmark` makes shards.

    Attributes:
        format: It chooses the reader in datamodules/prepare/benchmark.py.
        size: Number of questions, counted by the benchmark's `count`; None: the benchmark's size.
        contents: Description of the contents if they are not `size` rows.
        md5: Checksums given by the publisher; empty if unknown.
    """

    file: str
    url: str
    format: Format
    size: int | None = None
    contents: str = ""
    md5: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Prompt of a question: `prefix`, the question with its images, its options, `suffix`.

    Attributes:
        options: Whether the lettered options of ``meta["choices"]`` follow the question.
        place_images: Whether images are inserted at ``<image n>`` in the question or an option.
        reference_sha256: First digits of the sha256 of the reference implementation's prompt, if that is a longer text
            which users provide as a file; empty if this is the reference prompt.
    """

    prefix: str = ""
    suffix: str = ""
    options: bool = False
    place_images: bool = False
    reference_sha256: str = ""

    @classmethod
    def read(cls, path: Path, known: "Prompt") -> "Prompt":
        """Read prefix and suffix from a prompt file with ``{question}`` exactly once between; `known` has the rest.

        Raises a DataError where there is no such file, or it is not one.
        """
        try:
            text = decode_text(path.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"prompt file {path} cannot be read: {error}") from error
        if text.count(QUESTION) != 1:
            raise DataError(f"prompt file {path}: expected {{question}} once, found it {text.count(QUESTION)} times")
        prefix, suffix = text.split(QUESTION)
        return replace(known, prefix=prefix, suffix=suffix)

    @property
    def is_reference(self) -> bool | None:
        """Whether this is the reference implementation's prompt; None if `reference_sha256` is empty.

        It is not published what the checksum covers, so the text before the question, the text around it, and the text
        with the placeholder are tried.
        """
        if not self.reference_sha256:
            return None
        texts = (self.prefix, self.prefix + self.suffix, f"{self.prefix}{QUESTION}{self.suffix}")
        digests = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
        return any(digest.startswith(self.reference_sha256) for digest in digests)

    def apply(self, content: list[dict[str, Any]], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the content parts of the user's turn with the prompt around them; leading images stay first."""
        first = next((n for n, part in enumerate(content) if part["type"] == "text"), len(content))
        choices = meta.get("choices") if self.options else None
        listing = "".join(f"\n{letter}. {text}" for letter, text in choices.items()) if choices else ""
        # Open questions of a multiple-choice benchmark get no instruction to choose.
        after = f"\nOptions:{listing}{self.suffix}" if listing else "" if self.options else self.suffix
        parts = [*content[:first], _text(self.prefix), *content[first:], _text(after)]
        parts = [part for part in parts if part.get("text") != ""]
        return _place_images(parts) if self.place_images else parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A metric by its name, and the rules under which it is reported, the default first; empty: all that it has."""

    metric: str
    rules: tuple[str, ...] = ()

    def load(self) -> tuple[Metric, tuple[str, ...]]:
        """Return the metric and its rules; a ConfigError if there is no such metric or rule."""
        metric = get_metric(self.metric)
        return metric, tuple(metric.check_rule(rule) for rule in self.rules) or metric.rules


def _one(sample: EvalSample) -> int:  # no lambda: workers that load data are sent benchmarks
    return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark: everything that its scores depend on.

    Attributes:
        name: Name in configs, results and TensorBoard tags; `title` is that in reports, as in the paper.
        size: Number of questions, counted by `count`; 0: unknown, completeness is not checked.
        scorings: Metrics; the first score of the first metric is the headline.
        sources: Files from which shards can be made.
        prompts: Prompts of parts, by the value of ``meta["split"]``; they replace `prompt`, that of each question.
        max_new_tokens: Maximum length of a prediction in tokens; None: the evaluation's setting.
        postprocessing: Description of the metric's normalisation of predictions.
        groups: Key of ``meta`` by whose values scores are also reported; empty: none.
        list_answers: Whether a reference text that is a Python list is parsed as a list of references, as VLMEvalKit
            does for most of its tables.
        only: Keys and values of ``meta`` that a question must have to belong to the benchmark.
        count: Number of questions that a prediction counts as.
        paper: Model -> score in the paper, in per cent.
    """

    name: str
    title: str
    split: str
    size: int
    scorings: tuple[Scoring, ...]
    sources: tuple[SourceFile, ...] = ()
    licence: str = "unknown"
    prompt: Prompt = field(default_factory=Prompt)
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    max_new_tokens: int | None = None
    postprocessing: str = ""
    groups: str = ""
    list_answers: bool = True
    only: Mapping[str, str] = field(default_factory=dict)
    count: Callable[[EvalSample], int] = _one
    paper: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""

    def belongs(self, meta: Mapping[str, Any]) -> bool:
        """Return whether a question with this ``meta`` is part of the benchmark."""
        return all(meta.get(name) == value for name, value in self.only.items())

    def prompt_for(self, meta: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a question."""
        return self.prompts.get(str(meta.get("split")), self.prompt)

    def prompts_are_reference(self) -> dict[str, bool]:
        """Return, for each part with a `reference_sha256`, whether its prompt is the reference implementation's."""
        found = {part: prompt.is_reference for part, prompt in (self.prompts or {"": self.prompt}).items()}
        return {part: known for part, known in found.items() if known is not None}

    def size_from(self, origin: str) -> int:
        """Return the number of questions of a dataset made from the file of this name; 0: unknown."""
        sizes = {source.file: source.size for source in self.sources}
        return sizes.get(origin) or self.size


def plain_benchmark(name: str, *, metrics: tuple[str, ...], size: int = 0) -> Benchmark:
    """Return the benchmark of an unregistered dataset: metrics from the config, each under its default rule.

    Scores are also reported by ``meta["group"]``.
    """
    scorings = tuple(Scoring(metric=metric, rules=get_metric(metric).rules[:1]) for metric in metrics)
    return Benchmark(name=name, title=name, split="", size=size, scorings=scorings, groups="group")


def with_prompt_files(benchmark: Benchmark | None, files: Mapping[str, Path], *, name: str) -> Benchmark | None:
    """Return a benchmark, None for an unregistered dataset, with the prompts of parts replaced by prompt files.

    `files` has part (empty: all questions) -> file; `name` is the dataset's in errors.

    Raises:
        ConfigError: There is no such part, or the dataset is not a registered benchmark.
        DataError: A file is not a prompt file.
    """
    if not files:
        return benchmark
    if benchmark is None:
        raise ConfigError(f"data.init_args.prompts: {name!r} is no registered benchmark and takes no prompt file")
    known = benchmark.prompts or {"": benchmark.prompt}
    for part in files:
        require_known(part, known, f"data.init_args.prompts: {name!r} has no part {part!r}")
    read = {part: Prompt.read(path, known[part]) for part, path in files.items()}
    if benchmark.prompts:
        return replace(benchmark, prompts={**benchmark.prompts, **read})
    return replace(benchmark, prompt=read[""])


def _place_images(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Insert images where the text first names them; images that are not named stay first."""
    images = {part["index"]: part for part in parts if part["type"] == "image"}
    placed: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            continue
        for number, split in enumerate(_IMAGE.split(part["text"])):
            named = images.pop(int(split) - 1, None) if number % 2 else _text(split)
            placed += [named] if named and named != _text("") else []
    return [*images.values(), *placed]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
