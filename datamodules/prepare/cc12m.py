"""`prepare cc12m`: tars of images and captions as img2dataset writes them -> globally shuffled shards.

Format: tars of `{key}.jpg`, `{key}.txt`, `{key}.json`, for example CC-12M of pixparse or laion.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from alignvlm_pl.errors import DataError

from ..shards.sample import SampleError
from ..shards.sample_formats import CAPTION_PROMPT, CaptionReader, RawSample
from ..shards.tar_walk import SeenKeys, read_sample, require_members, sample_groups, walk_range
from ..storage.file_kinds import path_text
from ..storage.stored_files import StoredFile, list_files, local_copy, short_names
from .pack.work_folder import fetched_folder
from .sources.source import SourceSample, checked_image

_KEPT = ("url", "sha256")  # fields of a pair's json that say where the image came from


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTars:
    """The pairs of tars."""

    files: tuple[StoredFile, ...]
    fetched: Path = field(repr=False)  # folder of the copies of remote tars
    prompt: str  # text of the user's turn after the image; may be empty
    name: str = "cc12m"
    source: str = "cc12m"  # of the samples, and the first part of their ids
    license: str = "other (conceptual-12m)"

    def inputs(self) -> Iterator[Path]:
        return (Path(file.path) for file in self.files if file.local)

    def num_rows(self) -> None:
        return None

    def parts(self) -> list[tuple[StoredFile, str]]:
        """Return the tars, each with the first part of its keys."""
        names = [str(PurePosixPath(path_text(name)).with_suffix("")) for name in short_names(self.files)]
        return list(zip(self.files, names, strict=True))

    def rows(self, part: tuple[StoredFile, str]) -> Iterator[RawSample | SampleError]:
        """Yield the pairs of a tar; raise DataError where it is damaged or no sample of it is in one place."""
        file, name = part
        seen, apart, first = SeenKeys(file.name), 0, ""
        with local_copy(file, self.fetched) as path, path.open("rb") as stream:
            walked = walk_range(stream, file.name, 0, path.stat().st_size)
            folder = file.path.removesuffix(file.name)
            whole = require_members(
                walked, lambda damage: DataError(folder + damage.with_advice("fetch the tar again"))
            )
            for key, members in sample_groups(whole):
                if fault := seen.add(key, members):
                    error = SampleError(f"{file.path}: {fault.message}", fault.kind)
                    if fault.kind == "members_apart":
                        apart, first = apart + 1, first or str(error)
                    yield error
                    continue
                # Member names are not used as paths.
                yield read_sample(stream, f"{name}/{key}", members, url=file.path)
            if apart and apart >= len(seen):
                raise DataError(first)

    def sample(self, row: RawSample) -> SourceSample:
        """Convert a pair."""
        record, images, names = CaptionReader(prompt=self.prompt, source=self.source)(row)
        kept = json.loads(row["json"]) if "json" in row else {}
        record["meta"] = {name: kept[name] for name in _KEPT if isinstance(kept.get(name), str)}
        where = f"sample '{row['__key__']}' in {row['__url__']}"
        return SourceSample(
            record=record,
            images=[checked_image(data, f"{where}: {name}") for data, name in zip(images, names, strict=True)],
            where=where,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument(
        "input",
        help="tar, folder, pattern, URL (http, https, s3, gs, hf), or dataset of the hub such as pixparse/cc12m-wds",
    )
    parser.add_argument("--prompt", default=CAPTION_PROMPT, help="text of the user's turn (default: %(default)s)")


def open_source(options: argparse.Namespace) -> CaptionTars:
    """Return the raw data."""
    files = tuple(list_files(options.input, ".tar"))
    return CaptionTars(
        files=files, fetched=fetched_folder(options.out), prompt=options.prompt, source=options.source or "cc12m"
    )
