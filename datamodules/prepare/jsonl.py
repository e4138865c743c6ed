"""`prepare jsonl`: DocDownstream-style jsonl and its images -> shards and manifest, shuffled once for all.

One line is `{"image": ["a.png"], "messages": [{"role": "user", "content": "<|image|>Total?"}, {"role":
"assistant", "content": "12.50"}], "task_name": "qa_sft", "dataset_name": "DocVQA"}`, with optional
`references` (accepted answers) and `lines` (text lines of the first image). `images` may stand for `image`, `<image>`
for `<|image|>`, LLaVA's `conversations` for `messages`, parts of the sample schema for the content of a turn, and a
JSON list for the lines. Two runs give the same bytes.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from ..shards.columns import LINES
from ..shards.sample_formats import IMAGE_TOKEN, names_images
from ..storage.file_kinds import path_text
from .pack.options import require_at_least
from .sources.record_files import RecordFile, parsed

# `<` may be escaped.
_TOKEN = re.compile(rb"(?:<|\\u003[cC])image")


@dataclass(frozen=True, kw_only=True)
class JsonlData(RecordFile):
    """The records of a file."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return path_text(self.path.name)

    def check(self) -> None:
        require_at_least(0, start=self.start)
        super().check()

    def marks_images(self) -> bool:
        """Return whether ``<image>`` stands for an image in one of the records of the file."""
        records = parsed(text for _, text in self.raw() if _TOKEN.search(text))
        found = (record for record in records if isinstance(record, dict) and names_images(record))
        return any(IMAGE_TOKEN in str(record.get(name, "")) for record in found for name in LINES.fields["messages"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument("jsonl", type=Path, help="file with one record per line")
    parser.add_argument(
        "--image-root", type=Path, help="folder the image paths are relative to (default: the file's folder)"
    )
    parser.add_argument("--start", type=int, default=0, help="skip the first records of the file")


def open_source(options: argparse.Namespace) -> JsonlData:
    """Return the raw data."""
    return JsonlData(
        path=options.jsonl,
        image_root=options.image_root or options.jsonl.parent,
        source=options.source or options.name or options.out.resolve().name,
        start=options.start,
    )
