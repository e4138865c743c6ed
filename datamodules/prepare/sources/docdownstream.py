"""DocDownstream's test files, with the gold annotations of DUE.

Format: mPLUG/DocDownstream-1.0, `test/<Dataset>_test.jsonl` and `meta/<Dataset>/test/{document,metadata}.jsonl`. Gold
values come from `document.jsonl`: the question file holds one spelling of each answer only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.metrics.document_f1 import DEEPFORM_FIELDS, KLC_FIELDS

from ...shards.sample import SampleError
from ...shards.sample_formats import convert_docdownstream
from .lines import numbered_lines
from .source import SourceSample, checked_image

_NAMES = ("file_name", "name", "document", "doc_id", "image")
"""Fields of `metadata.jsonl` that may name the document; the reference reads the first."""
_FIELDS = {"deepform": DEEPFORM_FIELDS, "klc": KLC_FIELDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstreamTest:
    """The questions of a test file.

    Attributes:
        path: ``<Dataset>_test.jsonl``.
        benchmark: Whose questions they are.
        image_root: Folder that image paths are relative to.
        meta: Folder of ``document.jsonl`` and ``metadata.jsonl``; None: the answers of the question file.
    """

    path: Path
    benchmark: Benchmark
    image_root: Path
    meta: Path | None = None

    def __iter__(self) -> Iterator[SourceSample | SampleError]:
        """Yield the questions in the order of the file, and the errors of bad ones.

        Raises:
            ConfigError: The benchmark needs annotations and has none, or has them and must not.
            DataError: A file is missing, or the metadata are not parallel to the questions.
        """
        if self.meta is None and self._corpus:
            raise ConfigError(
                f"{self.benchmark.name} is scored against DUE's annotations: name the folder of document.jsonl and "
                "metadata.jsonl with --meta (meta/<Dataset>/test of DocDownstream)"
            )
        if self.meta and self.benchmark.name == "tabfact":
            # DUE writes 1 and 0 for True and False, and the reference does not read them (docs/benchmarks.md).
            raise ConfigError("tabfact is scored against the answers of its question file: leave out --meta")
        gold = _Gold(self.meta, self._origin) if self.meta else None
        questions = list(numbered_lines(self.path))
        if gold and len(gold.names) != len(questions):
            raise DataError(
                f"{gold.folder / 'metadata.jsonl'} has {len(gold.names)} lines, {self.path} has {len(questions)} "
                "questions; they must be parallel"
            )
        for index, (number, text) in enumerate(questions):
            try:
                yield self._sample(text, gold, index, f"{self.path}, line {number}")
            except SampleError as error:
                yield error

    @property
    def _corpus(self) -> bool:
        return any(scoring.metric == "document_f1" for scoring in self.benchmark.scorings)

    @property
    def _origin(self) -> str:
        return next((s.url for s in self.benchmark.sources if s.format == "docdownstream"), "")

    def _sample(self, text: str, gold: "_Gold | None", index: int, where: str) -> SourceSample:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{where}: not JSON ({error})", "bad_json") from error
        if not isinstance(given, dict):
            raise SampleError(f"{where}: expected an object, found {given!r:.60}", "bad_json")
        record = convert_docdownstream(given, where=where)
        if gold:
            if self._corpus:
                fields = _FIELDS.get(self.benchmark.name, DEEPFORM_FIELDS + KLC_FIELDS)
                record["meta"] = gold.document(index, where) | {"field": gold.field(index, fields, where)}
            else:
                record["references"] = gold.answers(index, where, items=self.benchmark.name == "wtq")
        paths = given.get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise SampleError(f"{where}: expected paths as image, found {paths!r:.60}", "missing_image")
        images = [self._image(path, where) for path in paths]
        return SourceSample(record=record, images=images)

    def _image(self, name: str, where: str) -> tuple[bytes | Path, str]:
        path = self.image_root / name
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # the latter: names that no file can have
            raise SampleError(f"{where}: image {name!r:.200}: {error}", "missing_image") from error
        return checked_image(data, f"{where}: {path}")


class _Gold:
    """The annotations of a folder, and for each question its document and how the annotations call it.

    Args:
        folder: Folder of the two files.
        origin: Where they are to be fetched from.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self.folder = folder
        self._annotations = {
            entry["name"]: entry["annotations"]
            for entry in _lines(folder / "document.jsonl", origin, annotated=True)
        }
        self._metadata = _lines(folder / "metadata.jsonl", origin)
        self.names = [self._name(line) for line in self._metadata]

    def document(self, index: int, where: str) -> dict[str, Any]:
        """Return name and annotation of the document of a question."""
        name = self.names[index]
        if name not in self._annotations:
            raise SampleError(
                f"{where}: document {name!r} is not in {self.folder / 'document.jsonl'}", "no_gold"
            )
        return {"document": name, "gold": self._annotations[name]}

    def field(self, index: int, fields: Sequence[str], where: str) -> str:
        """Return the field that is asked for: the first of the list that the question of the metadata holds."""
        question = self._question(index, where)
        found = next((name for name in fields if name in question), None)
        if found is None:
            raise SampleError(f"{where}: {question!r:.80} names none of {', '.join(fields)}", "no_field")
        return found

    def answers(self, index: int, where: str, *, items: bool) -> list[str]:
        """Return the accepted answers of a question: all variants of its values, or with `items` its values."""
        annotation, question = self.document(index, where)["gold"], self._question(index, where)
        values = [value for entry in annotation if entry["key"] == question for value in entry["values"]]
        found = [
            [value["value"]] if items else value.get("value_variants") or [value["value"]] for value in values
        ]
        if not found:
            raise SampleError(f"{where}: no gold answer to {question!r:.80} in its document", "no_answer")
        return [text for variants in found for text in variants]

    def _question(self, index: int, where: str) -> str:
        """Return a question as the annotations spell it; that of the question file may be revised."""
        given: Any = self._metadata[index].get("ground_truth")
        try:
            question = (json.loads(given) if isinstance(given, str) else given)["gt_parses"][0]["question"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise SampleError(
                f"{where}: its line of {self.folder / 'metadata.jsonl'} has no question in ground_truth, "
                f"gt_parses ({error!r})",
                "bad_metadata",
            ) from error
        return str(question)

    def _name(self, line: Mapping[str, Any]) -> str:
        """Return the document of a line: what it names, or the one whose name its file's name holds."""
        for field in _NAMES:
            given = line.get(field)
            text = given[0] if isinstance(given, list) and given else given
            if isinstance(text, str):
                stem = Path(text).stem
                # <folders>/<document>.pdf_<page>.png for the reference; others call pages <document>_<page>.png.
                for name in (text.split("/")[-1].split(".pdf")[0], text, stem, stem.rpartition("_")[0]):
                    if name in self._annotations:
                        return name
        return str(next((line[field] for field in _NAMES if field in line), "?"))


def _annotation(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "key": item["key"],
            "values": [
                {name: value[name] for name in ("value", "value_variants") if value.get(name) is not None}
                for value in item["values"]
            ],
        }
        for item in entry["annotations"]
    ]


def _lines(path: Path, origin: str, *, annotated: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"there is no {path}; it comes with DocDownstream in meta/<Dataset>/test, to be fetched from {origin}"
        )
    found = []
    for number, text in numbered_lines(path):
        try:
            entry = json.loads(text)
            if not isinstance(entry, dict):
                raise TypeError(f"expected an object, found {text:.60}")
            if annotated:
                entry["annotations"] = _annotation(entry)
                entry["name"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error!r}") from error
        found.append(entry)
    return found
