"""`prepare benchmark`: a benchmark's published file -> shards in the sample schema.

Reads VLMEvalKit's `<NAME>.tsv` (rows with base64 images) or DocDownstream's `<Dataset>_test.jsonl`, whose references
come from DUE's `meta/<Dataset>/test/{document,metadata}.jsonl`.
"""

import argparse
import ast
import base64
import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.benchmarks import Benchmark, get_benchmark
from alignvlm_pl.benchmarks.base import SourceFile
from alignvlm_pl.benchmarks.rows import answer_problem, read_row
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.metrics.base import has_text
from alignvlm_pl.metrics.document_f1 import DEEPFORM_FIELDS, KLC_FIELDS
from alignvlm_pl.preprocessing.images.source import decode_base64
from alignvlm_pl.scoring.tsv import TableRow, TabTable
from alignvlm_pl.utils.text_files import parse_json, read_head, require_unpacked

from ..shards.manifest import load_manifest
from ..shards.sample import SampleError, last_question, references
from ..shards.sample_formats import convert_docdownstream
from ..shards.skipped_rows import SkippedRows, print_skipped_rows
from ..shards.writer import ShardWriter
from ..storage.fetching import file_digest
from ..storage.file_kinds import path_text
from .sources.images import EncodedImage, ImageFolder, image_names
from .sources.json_files import parse_object, raw_lines, require_lines
from .sources.source import SourceSample, checked_image, or_error

POINTER_LENGTH = 64
"""A text up to this length in the image column is the index of the row that holds the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VLMEvalKitTable:
    """The rows of a benchmark in a file; a column ``image_path`` names files below `image_root`."""

    path: Path
    benchmark: Benchmark
    image_root: Path | None = None

    def __iter__(self) -> Iterator[SourceSample | SampleError]:
        """Yield a sample or the error of an invalid row, in file order; raise DataError for another table."""
        table = _open(self.path, self.benchmark)
        offsets, seen, others = _image_offsets(table), set(), 0
        for row in table.rows():
            where = f"{self.path}, row {row.number}"
            index = row.cells.get("index", "").strip()
            if row.problem:
                yield SampleError(f"{where}: {row.problem}", "broken_row")
            elif not self.benchmark.belongs(read_row(row.cells, self.benchmark)[2]):
                others += 1
            elif index and index in seen:
                yield SampleError(f"{where}: index {index!r} is that of an earlier row", "repeated_index")
            else:
                seen.add(index)
                yield or_error(self._sample, row, table, offsets, where)
        if others and not seen:
            wanted = ", ".join(f"{name} {value!r}" for name, value in self.benchmark.only.items())
            raise DataError(f"{self.path}: {others} rows, none of {self.benchmark.name}: expected {wanted}")

    def _sample(self, row: TableRow, table: TabTable, offsets: Mapping[str, int], where: str) -> SourceSample:
        question, answers, meta = read_row(row.cells, self.benchmark)
        if not meta.get("index", "").strip():
            raise SampleError(f"{where}: no index, by which predictions are joined with the row", "no_index")
        if not question.strip():
            raise SampleError(f"{where}: the question is empty", "no_question")
        if not answers:
            raise SampleError(f"{where}: the answer is empty: it cannot be scored", "no_answer")
        if problem := answer_problem(row.cells, self.benchmark):
            raise SampleError(f"{where}: {problem}", "bad_answer")
        images = self._images(row.cells, table, offsets, where)
        content = [{"type": "image", "index": index} for index in range(len(images))]
        record = {
            "id": f"{path_text(self.path.stem)}/{meta.get('index', '')}",
            "task": "vqa",
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "references": answers,
            "meta": meta,
        }
        return SourceSample(record=record, images=images, where=where)

    def _images(
        self, row: Mapping[str, str], table: TabTable, offsets: Mapping[str, int], where: str
    ) -> list[EncodedImage]:
        if cells := _list_elements(row.get("image") or ""):
            decoded = [data for cell in cells for data in _decode_images(cell, table, offsets, where)]
            return [checked_image(data, f"{where}: image") for data in decoded]
        if paths := _list_elements(row.get("image_path") or ""):
            folder = ImageFolder(root=self.image_root or self.path.parent)
            return [folder.read(path, where=where) for path in paths]
        raise SampleError(f"{where}: neither image nor image_path is filled", "missing_image")


def _open(path: Path, benchmark: Benchmark) -> TabTable:
    table = TabTable(path)
    columns = set(table.header)
    if not {"index", "question", "answer", *benchmark.only} <= columns or not {"image", "image_path"} & columns:
        plain = [name.strip().lower() for name in table.header]
        spelled = "question" in plain and plain != table.header
        advice = "; write the names of the columns in lower case, without spaces" if spelled else ""
        raise DataError(
            f"{path} is no table of VLMEvalKit for {benchmark.name}: expected columns "
            f"{', '.join(('index, image or image_path, question, answer', *benchmark.only))}, found "
            f"{', '.join(table.header)[:200] or 'an empty file'}{advice}"
        )
    return table


def _image_offsets(table: TabTable) -> dict[str, int]:
    """Return index -> byte offset of each row that holds an image itself."""
    if not {"index", "image"} <= set(table.header):
        return {}
    held = (row for row in table.rows() if len(row.cells.get("image", "")) > POINTER_LENGTH)
    return {row.cells["index"]: row.offset for row in held}


def _list_elements(cell: str) -> list[str]:
    """Return the elements of a cell: those of a Python list literal, else the text as the only element."""
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return [str(item) for item in found] if isinstance(found, list) else [cell]


def _decode_images(cell: str, table: TabTable, offsets: Mapping[str, int], where: str) -> list[bytes]:
    """Decode an image, or the images of the row that a short text points to."""
    if len(cell) > POINTER_LENGTH:
        return [_from_base64(cell, where)]
    if cell not in offsets:
        raise SampleError(
            f"{where}: the image {cell!r} is neither an image in base64 nor the index of a row that holds one",
            "bad_pointer",
        )
    held = _list_elements(next(table.rows(offsets[cell])).cells["image"])
    if any(len(own) <= POINTER_LENGTH for own in held):
        raise SampleError(
            f"{where}: the image points to row index {cell!r}, which itself points to another", "bad_pointer"
        )
    return [_from_base64(own, where) for own in held]


def _from_base64(cell: str, where: str) -> bytes:
    """Decode base64: also in lines, of the URL-safe alphabet, without its padding, or as a ``data:`` URL."""
    with contextlib.suppress(ValueError):  # with few copies of a large text
        return base64.b64decode(cell, validate=True)
    try:
        return decode_base64(cell.rpartition(";base64,")[2], "the image")
    except DataError as error:
        raise SampleError(f"{where}: {error}", "bad_base64") from error


_NAMES = ("file_name", "name", "document", "doc_id", "image")
"""Fields of `metadata.jsonl` that may name the document; the reference reads the first."""
_FIELDS = {"deepform": DEEPFORM_FIELDS, "klc": KLC_FIELDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocDownstreamTest:
    """The questions of a benchmark in a file, ``<Dataset>_test.jsonl``, with images below `image_root`.

    References are those of the file, or of DUE's ``document.jsonl`` and ``metadata.jsonl`` in the folder `meta`.
    """

    path: Path
    benchmark: Benchmark
    image_root: Path
    meta: Path | None = None

    def __iter__(self) -> Iterator[SourceSample | SampleError]:
        """Yield the questions in the order of the file, and the errors of invalid ones.

        Raises:
            ConfigError: The benchmark needs `meta`, or must not have it.
            DataError: A file is missing, or the metadata are not parallel to the questions.
        """
        if self.meta is None and self._corpus:
            raise ConfigError(
                f"{self.benchmark.name} is scored against DUE's annotations: name the folder of document.jsonl and "
                "metadata.jsonl with --meta (meta/<Dataset>/test of DocDownstream)"
            )
        if self.meta and self.benchmark.name == "tabfact":
            # DUE writes 1 and 0 for True and False, and the reference does not read them (docs/benchmarks.md).
            raise ConfigError("tabfact is scored against the references of its question file: remove --meta")
        origin = next((source.url for source in self.benchmark.sources if source.format == "docdownstream"), "")
        gold = _Gold(self.meta, origin) if self.meta else None
        require_lines(self.path)
        questions = list(raw_lines(self.path))
        if gold and len(gold.names) != len(questions):
            raise DataError(
                f"{gold.folder / 'metadata.jsonl'} has {len(gold.names)} lines, {self.path} has {len(questions)} "
                "questions; they must be parallel"
            )
        for index, (number, text) in enumerate(questions):
            yield or_error(self._sample, text, gold, index, f"{self.path}, line {number}")

    @property
    def _corpus(self) -> bool:
        return any(scoring.metric == "document_f1" for scoring in self.benchmark.scorings)

    def _sample(self, text: bytes, gold: "_Gold | None", index: int, where: str) -> SourceSample:
        given = parse_object(text, where=where)
        names = image_names(given, where=where)
        record = convert_docdownstream(given, num_images=len(names), where=where)
        if not last_question(record["messages"]).strip():
            raise SampleError(f"{where}: the question is empty", "no_question")
        if gold:
            if self._corpus:
                fields = _FIELDS.get(self.benchmark.name, DEEPFORM_FIELDS + KLC_FIELDS)
                record["meta"] = gold.document(index, where) | {"field": gold.field(index, fields, where)}
            else:
                record["references"] = gold.references(index, where, items=self.benchmark.name == "wtq")
        if not self._corpus and not references(record):
            raise SampleError(f"{where}: the answer is empty: it cannot be scored", "no_answer")
        images = [ImageFolder(root=self.image_root).read(name, where=where) for name in names]
        return SourceSample(record=record, images=images, where=where)


class _Gold:
    """DUE's annotations in a folder, and for each question its document and field; `origin` is where they are found."""

    def __init__(self, folder: Path, origin: str) -> None:
        self.folder = folder
        self._annotations: dict[str, list[dict[str, Any]]] = {}
        for where, entry in _objects(folder / "document.jsonl", origin):
            try:
                self._annotations[entry["name"]] = _annotation(entry)
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{where}: {error!r}") from error
        self._metadata = [entry for _, entry in _objects(folder / "metadata.jsonl", origin)]
        self.names = [self._name(line) for line in self._metadata]

    def document(self, index: int, where: str) -> dict[str, Any]:
        name = self.names[index]
        if name not in self._annotations:
            raise SampleError(f"{where}: document {name!r} is not in {self.folder / 'document.jsonl'}", "no_gold")
        return {"document": name, "gold": self._annotations[name]}

    def field(self, index: int, fields: Sequence[str], where: str) -> str:
        """Return the field that is requested: the first of the list that the question of the metadata holds."""
        question = self._question(index, where)
        found = next((name for name in fields if name in question), None)
        if found is None:
            raise SampleError(f"{where}: {question!r:.80} names none of {', '.join(fields)}", "no_field")
        return found

    def references(self, index: int, where: str, *, items: bool) -> list[str]:
        """Return the references of a question: all variants of its values, or with `items` the values alone."""
        annotation, question = self.document(index, where)["gold"], self._question(index, where)
        values = [value for entry in annotation if entry["key"] == question for value in entry["values"]]
        found = [[value["value"]] if items else value.get("value_variants") or [value["value"]] for value in values]
        texts = [text for variants in found for text in variants]
        if not has_text(texts):
            raise SampleError(f"{where}: no gold answer to {question!r:.80} in its document", "no_answer")
        return texts

    def _question(self, index: int, where: str) -> str:
        """Return a question as spelled in the annotations; the question file may have a revised one."""
        given: Any = self._metadata[index].get("ground_truth")
        try:
            question = (parse_json(given) if isinstance(given, str) else given)["gt_parses"][0]["question"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise SampleError(
                f"{where}: its line of {self.folder / 'metadata.jsonl'} has no question in ground_truth, "
                f"gt_parses ({error!r})",
                "bad_metadata",
            ) from error
        return str(question)

    def _name(self, line: Mapping[str, Any]) -> str:
        """Return the document of a line: the name in it, or the one that its file name contains."""
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
    kept = ("value", "value_variants")
    return [
        {
            "key": item["key"],
            "values": [{name: value[name] for name in kept if value.get(name) is not None} for value in item["values"]],
        }
        for item in entry["annotations"]
    ]


def _objects(path: Path, origin: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(
            f"there is no {path}; it comes with DocDownstream in meta/<Dataset>/test, to be fetched from {origin}"
        )
    require_lines(path)
    for number, line in raw_lines(path):
        where = f"{path}, line {number}"
        yield where, parse_object(line, where=where)


logger = logging.getLogger(__name__)
_READERS = {".tsv": "vlmevalkit-tsv", ".jsonl": "docdownstream"}


def main(argv: Sequence[str]) -> None:
    """Run `prepare benchmark`."""
    parser = argparse.ArgumentParser(prog="prepare benchmark", description=__doc__)
    parser.add_argument("benchmark", help="name of a benchmark, for example docvqa")
    parser.add_argument("file", type=Path, help="VLMEvalKit's <NAME>.tsv, or DocDownstream's <Dataset>_test.jsonl")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--image-root", type=Path, help="folder that image paths are relative to; default: the file's")
    parser.add_argument("--meta", type=Path, help="folder of DUE's document.jsonl and metadata.jsonl")
    parser.add_argument("--strict", action="store_true", help="stop at the first invalid row")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    options = parser.parse_args(argv)
    benchmark = get_benchmark(options.benchmark)
    _check_published(benchmark, options.file)
    samples, skipped = _open_source(benchmark, options.file, options), SkippedRows()
    with ShardWriter(
        options.out, name=benchmark.name, source=benchmark.name, license=benchmark.licence, overwrite=options.overwrite
    ) as writer:
        for sample in samples:
            try:
                if isinstance(sample, SampleError):
                    raise sample
                data = [image for image, _ in sample.images]
                writer.add(sample.record, data, [ending for _, ending in sample.images])
            except SampleError as error:
                if options.strict:
                    raise
                skipped.skip(error)
        skipped.require_written(writer.num_samples, options.file)
        writer.extra |= {
            "benchmark": benchmark.name,
            "origin": path_text(options.file.name),
            "origin_sha256": file_digest(options.file),
        } | skipped.extra()
    skipped.write(options.out)
    manifest = load_manifest(options.out)
    sys.stdout.write(f"{manifest.num_samples} questions in {len(manifest.shards)} shards: {manifest.folder}\n")
    print_skipped_rows(manifest.extra)


def _open_source(benchmark: Benchmark, path: Path, options: argparse.Namespace) -> Iterable[SourceSample | SampleError]:
    """Open a published file; raise an error with file, origin and size where it is missing or of another format."""
    ending = path.suffix.lower()
    if path.is_file():
        require_unpacked(read_head(path), where=str(path))
    expected = f"{benchmark.name} is made from " + ", or ".join(
        _describe_source(source, benchmark) for source in benchmark.sources
    )
    if ending not in _READERS:
        raise ConfigError(f"{path}: expected a {' or '.join(_READERS)} file; {expected}")
    if benchmark.sources and _READERS[ending] not in {source.format for source in benchmark.sources}:
        raise ConfigError(f"{path}: {benchmark.name} is not made from {path.suffix} files; {expected}")
    if not path.is_file():
        raise DataError(f"there is no {path}; {expected}")
    if ending == ".tsv":
        return VLMEvalKitTable(path=path, benchmark=benchmark, image_root=options.image_root)
    root = options.image_root or path.parent
    return DocDownstreamTest(path=path, benchmark=benchmark, image_root=root, meta=options.meta)


def _check_published(benchmark: Benchmark, path: Path) -> None:
    """Warn if a file is not the published one, by its md5: scores would not be comparable."""
    known = [md5 for source in benchmark.sources if source.file == path.name for md5 in source.md5]
    if known and path.is_file() and (found := file_digest(path, "md5")) not in known:
        logger.warning("%s is not the published file: expected md5 %s, found %s", path, " or ".join(known), found)


def _describe_source(source: SourceFile, benchmark: Benchmark) -> str:
    held = source.contents or f"{source.size or benchmark.size:,} questions"
    return f"{source.file} ({held}), to be fetched from {source.url}"
