"""VCR-wiki: a picture above its caption, parts of which are covered; the covered texts are to be restored.

Format: vcr-org/VCR-wiki-en-easy and its siblings, parquet with `question_id`, `stacked_image`, `crossed_text` and
`caption`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...shards.columns import VCR
from ...shards.sample import SampleError
from ...shards.sample_formats import conversation
from .parquet_rows import ParquetRows
from .pictures import held_picture
from .source import SourceSample

PROMPT = "What is the covered texts in the image? Please restore the covered texts without outputting the explanations."
SEPARATOR = "\n"
"""Between covered texts: they may hold commas, but come from one line, so a line break parts them without a doubt.
The score looks for each text's tokens anywhere in the reply and does not mind what stands between."""


@dataclass(frozen=True, kw_only=True)
class VCRRows(ParquetRows):
    """The rows of parquet files.

    The natural picture and the strip alone, which nothing is asked about, are most of a file and are not read.

    Attributes:
        prompt: Text of the user's turn.
    """

    name: str = "vcr"
    source: str = "vcr-wiki"
    license: str = "CC-BY-SA-4.0"
    prompt: str = PROMPT
    schema = VCR
    optional = ("caption",)

    def sample(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row; the answer is the covered texts in the order of the caption, parted by `SEPARATOR`."""
        covered = row[columns["answers"]]
        if not isinstance(covered, list) or not all(isinstance(text, str) for text in covered):
            raise SampleError(
                f"{where}: crossed_text must be a list of texts, found {covered!r:.120}", "bad_row"
            )
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
        return SourceSample(record=record, images=[held_picture(row[columns["images"]], where=where)])
