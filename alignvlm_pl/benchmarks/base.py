"""What a benchmark says about itself. Each file beside this one defines one benchmark, or one family."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alignvlm_pl.errors import ConfigError, DataError, nearest
from alignvlm_pl.metrics import Metric, get_metric
from alignvlm_pl.metrics.base import Answer

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""The suffix that VLMEvalKit and LLaVA put after a question that wants a short answer."""

_IMAGE = re.compile(r"<image (\d+)>")
QUESTION = "{question}"
"""What stands for the question in a prompt file."""
Format = Literal["vlmevalkit-tsv", "docdownstream", "wtq", "tabfact"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file to fetch, from which `prepare` makes the shards.

    Attributes:
        file: Its name.
        url: Where it comes from.
        format: How it is read (CONTRACT: datamodules/prepare/benchmark.py).
        size: Questions in it, counted by the benchmark's `count`; None: as many as the benchmark has.
        contents: What the file holds where that is not `size` rows, in words.
        md5: Checksums of the published file, as its publisher gives them; empty where none are known.
    """

    file: str
    url: str
    format: Format
    size: int | None = None
    contents: str = ""
    md5: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What stands around a question: `prefix`, the question with its images, the options, `suffix`.

    Attributes:
        prefix: Text before the question.
        suffix: Text after the question and its options.
        options: Whether the lettered options of ``meta["choices"]`` follow the question.
        place_images: Whether images go to where ``<image n>`` stands for them, in the question or an option.
        reference_sha256: First digits of the sha256 of the reference's literal prompt, where that is a longer text
            of its own, which users bring as a file; empty where ours is the reference's.
    """

    prefix: str = ""
    suffix: str = ""
    options: bool = False
    place_images: bool = False
    reference_sha256: str = ""

    @classmethod
    def read(cls, path: Path, known: "Prompt") -> "Prompt":
        """Take the prompt from a user's file, in which ``{question}`` stands for the question and its options.

        Raises:
            DataError: The file cannot be read, or names the question not exactly once.
        """
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"prompt file {path} cannot be read: {error}") from error
        if text.count(QUESTION) != 1:
            raise DataError(
                f"prompt file {path}: expected {{question}} once, found it {text.count(QUESTION)} times"
            )
        prefix, suffix = text.split(QUESTION)
        return replace(known, prefix=prefix, suffix=suffix)

    @property
    def is_reference(self) -> bool | None:
        """Whether this is the reference's literal prompt; None where the reference has none of its own.

        Which part of it a published checksum is of, nobody says: the text up to the question, the text around it, and
        the text with its placeholder are tried.
        """
        if not self.reference_sha256:
            return None
        texts = (self.prefix, self.prefix + self.suffix, f"{self.prefix}{QUESTION}{self.suffix}")
        digests = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
        return any(digest.startswith(self.reference_sha256) for digest in digests)

    def apply(self, content: list[dict[str, Any]], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Put the prompt around the parts of the user's turn; leading images stay in front."""
        first = next((n for n, part in enumerate(content) if part["type"] == "text"), len(content))
        choices = meta.get("choices") if self.options else None
        listing = "".join(f"\n{letter}. {text}" for letter, text in choices.items()) if choices else ""
        # Open questions among multiple choice ones are not told to choose.
        after = f"\nOptions:{listing}{self.suffix}" if listing else "" if self.options else self.suffix
        parts = [*content[:first], _text(self.prefix), *content[first:], _text(after)]
        parts = [part for part in parts if part.get("text") != ""]
        return _placed(parts) if self.place_images else parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """One metric of a benchmark with the rules it is reported under; the first is the default.

    Attributes:
        metric: Name in `alignvlm_pl.metrics.METRICS`.
        rules: Rules to report; empty: all that the metric has.
    """

    metric: str
    rules: tuple[str, ...] = ()

    def load(self) -> tuple[Metric, tuple[str, ...]]:
        """Return the metric and its rules.

        Raises:
            ConfigError: There is no such metric or rule.
        """
        metric = get_metric(self.metric)
        return metric, tuple(metric.check_rule(rule) for rule in self.rules) or metric.rules


def _one(answer: Answer) -> int:
    return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark: all that a number from it depends on.

    Attributes:
        name: Name in configs, results and TensorBoard tags.
        title: Name in reports, as the paper writes it.
        split: Split of the data set that is answered.
        size: Questions of the whole benchmark, counted by `count`; 0: not known, nothing is compared.
        scorings: Metrics; the first figure of the first is the headline.
        sources: Files from which it can be made.
        licence: Licence of the data.
        prompt: What stands around each question.
        prompts: Prompts of single parts, by the value of ``meta["split"]``; they replace `prompt`.
        max_new_tokens: Longest answer in tokens; None: what the evaluation is set to.
        postprocessing: What the metric does to a prediction before it compares, in words; how it does is its rule's.
        groups: Key of ``meta`` whose values are also scored apart; empty: none.
        list_answers: Whether gold text that reads as a Python list is a list of accepted answers, as VLMEvalKit
            takes it for most of its tables.
        only: Keys of ``meta`` and the value a question must have to belong to the benchmark.
        count: Questions that an answer stands for.
        paper: Model -> figure printed by the paper, in per cent.
        notes: What else a reader of the figure must know.
    """

    name: str
    title: str
    split: str
    size: int
    scorings: tuple[Scoring, ...]
    sources: tuple[Source, ...] = ()
    licence: str = "unknown"
    prompt: Prompt = field(default_factory=Prompt)
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    max_new_tokens: int | None = None
    postprocessing: str = ""
    groups: str = ""
    list_answers: bool = True
    only: Mapping[str, str] = field(default_factory=dict)
    count: Callable[[Answer], int] = _one
    paper: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""

    def belongs(self, meta: Mapping[str, Any]) -> bool:
        """Whether a question with this ``meta`` is part of the benchmark."""
        return all(meta.get(name) == value for name, value in self.only.items())

    def prompt_of(self, meta: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a question."""
        return self.prompts.get(str(meta.get("split")), self.prompt)

    def prompts_are_reference(self) -> dict[str, bool]:
        """Whether each part's prompt is the reference's literal one, where the reference has one of its own."""
        found = {part: prompt.is_reference for part, prompt in (self.prompts or {"": self.prompt}).items()}
        return {part: known for part, known in found.items() if known is not None}

    def size_from(self, origin: str) -> int:
        """Questions of a whole set that was made from a file; 0: not known.

        Args:
            origin: Name of the file, as `prepare benchmark` keeps it in the manifest; empty: not known.
        """
        sizes = {source.file: source.size for source in self.sources}
        return sizes.get(origin) or self.size


def vlmevalkit_table(name: str, *md5: str, folder: str = "VLMEval", contents: str = "") -> Source:
    """Return the table that VLMEvalKit publishes under a name, with the checksums in its source."""
    url = f"https://opencompass.openxlab.space/utils/{folder}/{name}.tsv"
    return Source(file=f"{name}.tsv", url=url, format="vlmevalkit-tsv", md5=md5, contents=contents)


def plain_benchmark(name: str, *, metrics: tuple[str, ...], size: int = 0) -> Benchmark:
    """Make a benchmark of a set that is no registered one: the metrics of the config, each under its default rule."""
    scorings = tuple(Scoring(metric=metric, rules=get_metric(metric).rules[:1]) for metric in metrics)
    return Benchmark(name=name, title=name, split="", size=size, scorings=scorings)


def with_prompt_files(
    benchmark: Benchmark | None, files: Mapping[str, Path], *, name: str
) -> Benchmark | None:
    """Replace prompts by those of a user's files.

    Args:
        benchmark: The benchmark; None for a set that is no registered one.
        files: Part, or an empty text for the whole benchmark -> file.
        name: How errors name the set.

    Raises:
        ConfigError: There is no such part, or the set is no registered benchmark.
        DataError: A file is no prompt.
    """
    if not files:
        return benchmark
    if benchmark is None:
        raise ConfigError(
            f"data.init_args.prompts: {name!r} is no registered benchmark and takes no prompt file"
        )
    known = benchmark.prompts or {"": benchmark.prompt}
    for part in files:
        if part not in known:
            raise ConfigError(
                f"data.init_args.prompts: {name!r} has no part {part!r}; {nearest(part, known)}"
            )
    read = {part: Prompt.read(path, known[part]) for part, path in files.items()}
    if benchmark.prompts:
        return replace(benchmark, prompts={**benchmark.prompts, **read})
    return replace(benchmark, prompt=read[""])


def _placed(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put images where the text first names them; those that it does not name stay in front."""
    images = {part["index"]: part for part in parts if part["type"] == "image"}
    placed: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            continue
        for number, piece in enumerate(_IMAGE.split(part["text"])):
            named = images.pop(int(piece) - 1, None) if number % 2 else _text(piece)
            placed += [named] if named and named != _text("") else []
    return [*images.values(), *placed]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
