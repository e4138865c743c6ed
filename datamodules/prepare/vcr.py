"""`prepare vcr`: VCR-wiki (parquet), images with partly covered captions -> globally shuffled shards."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..shards.columns import VCR
from ..shards.sample import SampleError
from ..shards.sample_formats import conversation
from .input_files import add_parquet_options, parquet_files
from .pack.work_folder import fetched_folder
from .sources.images import embedded_image
from .sources.parquet_rows import ParquetRows
from .sources.source import SourceSample

PROMPT = "What is the covered texts in the image? Please restore the covered texts without outputting the explanations."
SEPARATOR = "\n"
"""Between covered texts: they may contain commas, but no line breaks.
The score looks for each text's tokens anywhere in the prediction, whatever is between them."""


@dataclass(frozen=True, kw_only=True)
class VCRRows(ParquetRows):
    """The rows of parquet files; the columns of the natural image and the strip, most of a file, are not read."""

    name: str = "vcr"
    source: str = "vcr-wiki"
    license: str = "CC-BY-SA-4.0"
    prompt: str = PROMPT  # text of the user's turn
    schema = VCR
    optional = ("caption",)

    def convert(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row; the answer is the covered texts in the order of the caption, joined by `SEPARATOR`.

        Raises a SampleError where there is no covered text.
        """
        covered = row[columns["answers"]]
        if not isinstance(covered, list) or not all(isinstance(text, str) for text in covered):
            raise SampleError(f"{where}: crossed_text must be a list of texts, found {covered!r:.120}", "bad_row")
        if not any(text.strip() for text in covered):
            raise SampleError(f"{where}: no covered text", "empty_answer")
        number = row[columns["id"]]
        record = {
            "id": f"{self.source}/{number}",
            "source": self.source,
            "task": "vcr",
            "messages": conversation([(self.prompt, SEPARATOR.join(covered))], num_images=1),
            "meta": {"question_id": number, "caption": row.get("caption")},
        }
        return SourceSample(record=record, images=[embedded_image(row[columns["images"]], where=where)], where=where)


_VARIANT = re.compile(r"VCR-wiki-(en|zh)-(easy|hard)", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_parquet_options(parser, hub_id="vcr-org/VCR-wiki-en-easy")
    parser.add_argument("--prompt", default=PROMPT, help="text of the user's turn (default: %(default)s)")


def open_source(options: argparse.Namespace) -> VCRRows:
    """Return the raw data."""
    variant = _VARIANT.search(options.input)
    source = options.source or (variant[0].lower() if variant else "vcr-wiki")
    return VCRRows(
        files=parquet_files(options), fetched=fetched_folder(options.out), prompt=options.prompt, source=source
    )
