"""`prepare folder`: images with texts beside them -> globally shuffled shards.

Beside `a.png` lies `a.txt` (caption or transcription, asked for by --prompt), or `a.json` with
`{"question", "answer"}`, `{"qa": [{"question", "answer"}]}` or `{"messages": [...]}`.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.text_files import decode_text, parse_json

from ..shards.sample import SampleError, check_record
from ..shards.sample_formats import (
    CAPTION_PROMPT,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN,
    conversation,
    convert_docdownstream,
    image_parts,
    is_converted,
)
from ..storage.file_kinds import compressed_name, file_in_any_case, path_text
from .sources.dialogues import check_answered
from .sources.images import ImageFolder, image_paths
from .sources.source import SourceSample

_FORMS = '{"question", "answer"}, {"qa": [{"question", "answer"}, ...]} or {"messages": [...]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class SidecarFolder:
    """The images below a folder."""

    root: Path
    prompt: str  # text of the user's turn for a `.txt`; may be empty
    name: str
    source: str  # of the samples, and the first part of their ids
    license: str = "unknown"

    def inputs(self) -> Iterator[Path]:
        for path in image_paths(self.root):
            yield self.root / path
            yield from filter(None, _texts_beside(self.root / path))

    def num_rows(self) -> int:
        """Return the number of images; raise DataError where there is none."""
        if not (found := sum(1 for _ in image_paths(self.root))):
            packed = compressed_name(sorted(os.listdir(self.root)), "")
            raise DataError(f"{self.root} holds no images{packed and '; '}{packed}")
        return found

    def parts(self) -> list[Path]:
        return [self.root]

    def rows(self, part: Path) -> Iterator[str]:
        """Yield the paths of the images in the folder."""
        return image_paths(part)

    def sample(self, row: str) -> SourceSample:
        """Convert an image with its text."""
        path = self.root / row
        where = path_text(path)
        record = self._record(path, where) | {
            "id": f"{self.source}/{path_text(PurePosixPath(row).with_suffix(''))}",
            "source": self.source,
        }
        check_record(record, num_images=1, where=where)
        check_answered(record, where=where)
        return SourceSample(record=record, images=[ImageFolder(root=self.root).read(row, where=where)], where=where)

    def _record(self, image: Path, where: str) -> dict[str, Any]:
        """Read the json beside an image, or the txt if the json is missing or of another form."""
        note, text = _texts_beside(image)
        try:
            given = parse_json(decode_text(note.read_bytes())) if note else None
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{note}: not JSON ({error})", "bad_json") from error
        if isinstance(given, Mapping) and (record := _convert_sidecar(given, where)) is not None:
            return record
        if text:
            try:
                answer = decode_text(text.read_bytes()).strip()
            except UnicodeDecodeError as error:
                raise SampleError(f"{text} is not UTF-8 ({error})", "bad_sidecar") from error
            return {"task": "caption", "messages": conversation([(self.prompt, answer)], num_images=1)}
        if given is None:
            raise SampleError(f"{where}: neither {image.stem}.txt nor {image.stem}.json is beside it", "missing_text")
        raise SampleError(f"{note}: expected {_FORMS}, found {given!r:.120}", "bad_sidecar")


def _texts_beside(image: Path) -> tuple[Path | None, Path | None]:
    """Return the json and the txt beside an image, ``a.txt`` or ``a.png.txt`` of ``a.png``, in any letter case."""
    json_file, text = (
        file_in_any_case(image.parent, f"{image.stem}{ending}")
        or file_in_any_case(image.parent, f"{image.name}{ending}")
        for ending in (".json", ".txt")
    )
    return json_file, text


def _convert_sidecar(given: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Convert the json beside an image; None if its form is unknown."""
    if "messages" in given:
        return _conversation(given, where)
    rows = given.get("qa", [given] if {"question", "answer"} <= set(given) else None)
    if not isinstance(rows, list) or not rows:
        return None
    asked = []
    for row in rows:
        texts = [row.get(field) for field in ("question", "answer")] if isinstance(row, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise SampleError(
                f"{where}: a question is {{question, answer}} of texts, found {row!r:.120}", "bad_sidecar"
            )
        asked.append((str(texts[0]), str(texts[1])))
    return {"task": "vqa", "messages": conversation(asked, num_images=1)}


def _conversation(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert turns of plain text, with or without ``<|image|>``, or turns of the sample schema."""
    turns = given["messages"]
    marked = any(mark in str(turns) for mark in (IMAGE_PLACEHOLDER, IMAGE_TOKEN)) or image_parts(turns)
    record: dict[str, Any] = {"messages": turns}
    if not is_converted(turns):
        record = convert_docdownstream(given, num_images=int(bool(marked)), where=where)
    check_record(record, num_images=len(image_parts(record["messages"])), where=where)
    if not image_parts(record["messages"]):
        first = next((turn for turn in record["messages"] if turn["role"] == "user"), None)
        if first is None:
            raise SampleError(f"{where}: no turn of the user", "bad_sidecar")
        first["content"] = [{"type": "image", "index": 0}, *first["content"]]
    return {"task": "conversation", "messages": record["messages"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument("input", type=Path, help="folder of the images, searched recursively")
    parser.add_argument(
        "--prompt", default=CAPTION_PROMPT, help="text of the user's turn before a .txt (default: %(default)s)"
    )


def open_source(options: argparse.Namespace) -> SidecarFolder:
    """Return the raw data."""
    name = path_text(options.input.resolve().name)
    return SidecarFolder(root=options.input, prompt=options.prompt, name=name, source=options.source or name)
