"""`prepare jsonl`: DocDownstream-style jsonl and its images -> shards and manifest, shuffled once for all.

One line is `{"image": ["a.png"], "messages": [{"role": "user", "content": "<|image|>Total?"}, {"role":
"assistant", "content": "12.50"}], "task_name": "qa_sft", "dataset_name": "DocVQA"}`, with optional
`references` (accepted answers) and `lines` (text lines of the first image). Two runs give the same bytes.
"""

import argparse
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.imaging import load_image

from ..manifest import Manifest, load_manifest
from ..normal_form import convert_docdownstream
from ..sample import SampleError, check_record
from ..shard_file import EXTENSIONS
from ..writer import MAX_SHARD_BYTES, ShardWriter

logger = logging.getLogger(__name__)
REPORT_NAME = "report.json"
MAX_REPORTED_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """Where one record of the jsonl file begins, so that only the order is held in memory."""

    number: int
    offset: int


def prepare_jsonl(
    jsonl: Path | str,
    image_root: Path | str,
    out: Path | str,
    *,
    name: str,
    license: str,
    source: str | None = None,
    samples_per_shard: int = 512,
    max_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
    start: int = 0,
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Pack a jsonl file and its images into shards.

    Bad records (no json, no image, placeholders and images that differ, …) are left out, counted by reason in
    the manifest under ``skipped``, and listed in ``report.json`` beside it.

    Args:
        jsonl: File with one record per line.
        image_root: Folder that the image paths are relative to.
        out: Folder for the shards.
        name: Name of the set, stem of shards and keys.
        license: Terms of the set.
        source: Value of ``source`` for records without ``dataset_name``; None for `name`.
        samples_per_shard: Samples after which a new shard begins.
        max_bytes: Size in bytes after which a new shard begins.
        seed: Seed of the global shuffle, which is over all records of the file.
        start: Leave out this many records of the file, before shuffling: with `limit`, a split.
        limit: Take at most this many records from there; None for all.
        strict: Raise at the first bad record instead.
        overwrite: Replace a finished set in `out`.

    Returns:
        The manifest of the new set.

    Raises:
        DataError: No such file, nothing usable in it, or with `strict` a bad record, naming file and line.
    """
    path, root = Path(jsonl), Path(image_root)
    if start < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"start={start} and limit={limit}: expected start >= 0 and limit >= 1")
    lines = _index(path)[start : None if limit is None else start + limit]
    random.Random(seed).shuffle(lines)
    problems: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    writer = ShardWriter(
        out,
        name=name,
        source=source or name,
        license=license,
        samples_per_shard=samples_per_shard,
        max_bytes=max_bytes,
        overwrite=overwrite,
    )
    with writer, path.open("rb") as stream:
        for line in lines:
            where = f"{path}, line {line.number}"
            try:
                _add(writer, _read(stream, line, where), root, where)
            except SampleError as error:
                if strict:
                    raise
                skipped[error.reason] += 1
                problems.append({"line": line.number, "reason": error.reason, "message": str(error)})
        if not writer.num_samples:
            raise DataError(
                f"{path}: none of {len(lines)} records is usable ({_listing(skipped)}); see the first: "
                f"{problems[0]['message'] if problems else 'the file is empty'}"
            )
        writer.extra |= {"seed": seed, "origin": path.name, "skipped": dict(sorted(skipped.items()))}
        _write_report(Path(out) / REPORT_NAME, writer.num_samples, skipped, problems)
    if skipped:
        logger.warning("left out %d of %d records: %s", skipped.total(), len(lines), _listing(skipped))
    return load_manifest(out)


def main(argv: Sequence[str]) -> int:
    """Command line of `prepare jsonl`; prints what was written and what was left out."""
    parser = argparse.ArgumentParser(prog="prepare jsonl", description=__doc__, allow_abbrev=False)
    parser.add_argument("jsonl", help="file with one record per line")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument(
        "--image-root", help="folder the image paths are relative to (default: the file's folder)"
    )
    parser.add_argument("--name", help="name of the set (default: the name of the output folder)")
    parser.add_argument("--license", default="unknown", help="terms of the set (default: %(default)s)")
    parser.add_argument(
        "--source", help="source of records without dataset_name (default: the name of the set)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=512, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the global shuffle (default: %(default)s)"
    )
    parser.add_argument("--start", type=int, default=0, help="leave out the first records of the file")
    parser.add_argument("--limit", type=int, help="take at most this many records")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished set")
    given = vars(parser.parse_args(list(argv)))
    root = given.pop("image_root") or Path(given["jsonl"]).parent
    given["name"] = given["name"] or Path(given["out"]).resolve().name
    manifest = prepare_jsonl(image_root=root, **given)
    sys.stdout.write(f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {manifest.folder}\n")
    if skipped := manifest.extra["skipped"]:
        report = manifest.where(REPORT_NAME)
        sys.stdout.write(f"left out: {_listing(Counter(skipped))} (details in {report})\n")
    return 0


def _index(path: Path) -> list[_Line]:
    """Find the lines of a file that hold a record."""
    if not path.is_file():
        raise DataError(f"no such jsonl file: {path}")
    lines, offset = [], 0
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            if text.strip():
                lines.append(_Line(number=number, offset=offset))
            offset += len(text)
    return lines


def _read(stream: Any, line: _Line, where: str) -> dict[str, Any]:
    stream.seek(line.offset)
    try:
        record = json.loads(stream.readline())
    except ValueError as error:
        raise SampleError(f"{where}: not JSON ({error})", "bad_json") from error
    if not isinstance(record, dict):
        raise SampleError(f"{where}: expected an object, found {type(record).__name__}", "bad_json")
    return record


def _add(writer: ShardWriter, record: dict[str, Any], root: Path, where: str) -> None:
    """Convert one record, check it against its images, and write it."""
    named = record.get("image", [])
    paths = [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError(f"{where}: 'image' must be a list of paths, found {named!r:.120}")
    normal = convert_docdownstream(record, where=where)
    check_record(normal, num_images=len(paths), where=where)
    images = [_read_image(root / path, where) for path in paths]
    writer.add(normal, [data for data, _ in images], [extension for _, extension in images])


def _read_image(path: Path, where: str) -> tuple[bytes, str]:
    """Read an image file and make sure that it decodes to the end."""
    extension = path.suffix.lower().lstrip(".")
    if extension not in EXTENSIONS:
        raise SampleError(f"{where}: image {path} is no {', '.join(EXTENSIONS)} file", "image_format")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError(f"{where}: image {path}: {error.strerror}", "missing_image") from error
    try:
        load_image(data, name=f"{where}: image {path}")
    except DataError as error:
        raise SampleError(str(error), "undecodable_image") from error
    return data, extension


def _write_report(path: Path, written: int, skipped: Counter[str], problems: list[dict[str, Any]]) -> None:
    first = sorted(problems, key=lambda problem: problem["line"])[:MAX_REPORTED_PROBLEMS]
    report = {"written": written, "skipped": dict(sorted(skipped.items())), "problems": first}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _listing(skipped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {number}" for reason, number in skipped.most_common()) or "nothing left out"
