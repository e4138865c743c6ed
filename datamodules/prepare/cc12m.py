"""`prepare cc12m`: tars of images and captions as img2dataset writes them -> globally shuffled shards.

Format: tars of `{key}.jpg`, `{key}.txt`, `{key}.json`, for example CC-12M of pixparse or laion.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from io import BufferedReader
from pathlib import PurePosixPath
from typing import IO

from alignvlm_pl.errors import DataError

from ..shards.sample import SampleError
from ..shards.sample_formats import CAPTION_PROMPT, CaptionReader
from ..shards.tar_walk import Member, SeenKeys, read_sample, require_members, sample_groups, walk_range
from ..storage.file_kinds import path_text
from ..storage.stored_files import StoredFile, StoredStream, list_files, short_names
from .sources.source import Part, SourceSample, checked_image, or_error

_KEPT = ("url", "sha256")  # fields of a pair's json that say where the image came from


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTars:
    """The pairs of tars."""

    files: tuple[StoredFile, ...]
    prompt: str  # text of the user's turn after the image; may be empty
    name: str = "cc12m"
    source: str = "cc12m"  # of the samples, and the first part of their ids
    license: str = "other (conceptual-12m)"

    def parts(self) -> list[Part]:
        names = short_names(self.files)
        return [Part(name=path_text(name), payload=(file,)) for file, name in zip(self.files, names, strict=True)]

    def input_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield the pairs of a tar; raise DataError where it is damaged or no sample of it is in one place."""
        file: StoredFile = part.payload[0]
        folder = file.path.removesuffix(file.name)
        with closing(BufferedReader(StoredStream(file))) as stream:
            walked = walk_range(stream, file.name, 0, file.size)
            whole = require_members(
                walked, lambda damage: DataError(folder + damage.with_advice("fetch the tar again"))
            )
            seen, usable, first = SeenKeys(file.name), 0, ""
            for key, members in sample_groups(whole):
                if fault := seen.add(key, members):
                    error = SampleError(f"{file.path}: {fault.message}", fault.kind)
                    first = first or str(error)
                    yield error
                    continue
                pair = or_error(self._pair, file, f"{PurePosixPath(part.name).with_suffix('')}/{key}", members, stream)
                usable += not isinstance(pair, SampleError)
                yield pair
            if first and not usable:
                raise DataError(first)

    def _pair(self, file: StoredFile, key: str, members: list[Member], stream: IO[bytes]) -> SourceSample:
        # Member names are not used as paths.
        raw = read_sample(stream, key, members, url=file.path)
        record, images, names = CaptionReader(prompt=self.prompt, source=self.source)(raw)
        kept = json.loads(raw["json"]) if "json" in raw else {}
        record["meta"] = {name: kept[name] for name in _KEPT if isinstance(kept.get(name), str)}
        where = f"sample '{key}' in {file.path}"
        return SourceSample(
            record=record,
            images=[checked_image(data, f"{where}: {name}") for data, name in zip(images, names, strict=True)],
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument(
        "input", help="tar, folder, pattern, URL that fsspec opens, or dataset of the hub such as pixparse/cc12m-wds"
    )
    parser.add_argument("--prompt", default=CAPTION_PROMPT, help="text of the user's turn (default: %(default)s)")


def open_source(options: argparse.Namespace) -> CaptionTars:
    """Return the raw data."""
    files = tuple(list_files(options.input, ".tar"))
    return CaptionTars(files=files, prompt=options.prompt, source=options.source or "cc12m")
