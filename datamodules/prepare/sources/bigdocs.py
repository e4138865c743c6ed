"""BigDocs-7.5M: document tasks in parquet files, whose pictures are in them or only named.

Format: ServiceNow/BigDocs-7.5M, nine configs. Three hold their pictures, six name them in `img_id`; see docs/data.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from alignvlm_pl.errors import ConfigError

from ...shards.columns import BIGDOCS
from ...shards.sample import SampleError
from ...shards.sample_formats import conversation, pairs
from .parquet_rows import ParquetRows
from .pictures import Picture, held_picture
from .source import SourceSample

WITH_PICTURES = ("ArxivOCR", "ArxivTableCap", "cord-v2")
FROM_FOLDERS = ("COCOtext", "pubtables-1m", "TextOCR", "Open4Business")
FROM_TABLES = ("TabFact", "WikiTQ")
CONFIGS = (*WITH_PICTURES, *FROM_FOLDERS, *FROM_TABLES)

_NAME = "img_id"
_PROVENANCE = (
    "query_info",
    "annotation_info",
    "image_info",
    "license",
    "licence",
    "dataset_name",
    "source",
)
_TASKS = ("task_name", "task")


class NamedPictures(Protocol):
    """Where the pictures of rows lie that only name them."""

    def named(self, name: str, *, where: str) -> list[Picture]:
        """Return the pages of a name.

        Raises:
            SampleError: There are none.
        """
        ...

    def estimate(self) -> tuple[int, int]:
        """Estimate the bytes of all pages, and of those that are not read from a file again when shards are written."""
        ...


@dataclass(frozen=True, kw_only=True)
class BigDocs(ParquetRows):
    """The rows of one config.

    Attributes:
        pictures: Where named pictures lie; None: the rows must hold them.
    """

    name: str = "bigdocs"
    license: str = "CC-BY-4.0"
    pictures: NamedPictures | None = None
    schema = BIGDOCS
    optional = (_NAME, *_PROVENANCE, *_TASKS)

    def input_bytes(self) -> int:
        """Estimate the size of the files and of the named pictures."""
        return super().input_bytes() + (self.pictures.estimate()[0] if self.pictures else 0)

    def spool_bytes(self) -> int:
        """Estimate what of it is not read from picture files again."""
        return super().input_bytes() + (self.pictures.estimate()[1] if self.pictures else 0)

    def check_columns(self, columns: Mapping[str, str], *, where: str) -> None:
        """Refuse rows that only name their pictures where nothing says where these lie."""
        if columns["images"] == _NAME and self.pictures is None:
            raise ConfigError(
                f"{where} only names its pictures ({_NAME}): give their folder with --image-root, or for TabFact and "
                "WikiTQ the folder of the release with --tables"
            )

    def sample(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row; several queries become turns about the same pictures."""
        asked = pairs(row[columns["queries"]], row[columns["answers"]], where=where)
        if not any(answer.strip() for _, answer in asked):
            raise SampleError(f"{where}: all annotations are empty", "empty_answer")
        images = self._images(row, columns["images"], where)
        kept = {name: row[name] for name in (*_PROVENANCE, _NAME) if row.get(name) is not None}
        record = {
            "id": f"{self.source}/{row[columns['id']]}",
            "source": self.source,
            "task": str(next((row[name] for name in _TASKS if row.get(name)), "document")),
            "messages": conversation(asked, num_images=len(images)),
            # Dates and the like become text.
            "meta": json.loads(json.dumps(kept, default=str)),
        }
        return SourceSample(record=record, images=images)

    def _images(self, row: Mapping[str, Any], column: str, where: str) -> list[Picture]:
        given = row[column]
        cells = [cell for cell in (given if isinstance(given, list) else [given]) if cell is not None]
        if column != _NAME and cells:
            return [held_picture(cell, where=where) for cell in cells]
        names = cells if column == _NAME else [row[_NAME]] if row.get(_NAME) is not None else []
        if not names or self.pictures is None:
            raise SampleError(f"{where}: the row holds no picture", "missing_image")
        return [image for name in names for image in self.pictures.named(str(name), where=where)]
