"""Columns of published tables: by which names each kind of source is known (no torch here)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from alignvlm_pl.errors import DataError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """Columns of one kind of source.

    Attributes:
        kind: The kind of `prepare` that reads it.
        unknown: What errors say of other columns.
        fields: What is read -> the names that its column may have, the first that is there counts.
    """

    kind: str
    unknown: str
    fields: Mapping[str, tuple[str, ...]]

    def resolve(self, columns: Collection[str], *, where: str, fields: Sequence[str] | None = None) -> dict[str, str]:
        """Return the column of each field.

        Args:
            columns: Names of the columns that are there.
            where: How an error names the table.
            fields: Fields that are needed; None for all.

        Raises:
            DataError: One has no column: a guess would misread every row.
        """
        found = {}
        for field in fields or tuple(self.fields):
            column = next((name for name in self.fields[field] if name in columns), None)
            if column is None:
                raise DataError(self._unknown(columns, field, where))
            found[field] = column
        return found

    def check_records(self, records: Iterable[Any], field: str, *, where: str) -> None:
        """Refuse the records of a file of which none of the first has a field; single bad ones are for who reads them.

        Args:
            records: What was parsed, in order; only objects count.
            field: The field.
            where: How an error names the file.

        Raises:
            DataError: As `resolve`.
        """
        first = [record for record in islice(records, _LOOKED_AT) if isinstance(record, Mapping)]
        if first and not any(name in record for name in self.fields[field] for record in first):
            self.resolve([str(name) for name in first[0]], where=where, fields=(field,))

    def _unknown(self, columns: Collection[str], field: str, where: str) -> str:
        expected = ", ".join(" or ".join(names) for names in self.fields.values())
        found = nearest(self.fields[field][0], columns).replace("known:", "found:")
        return (
            f"{where}: no column {' or '.join(self.fields[field])}; {self.unknown} ({found}). "
            f"Expected: {expected}. {_nearest(columns, self)}"
        )

    def share(self, columns: Collection[str]) -> float:
        """Return how many of the fields have a column, from 0 to 1."""
        return sum(any(name in columns for name in names) for names in self.fields.values()) / len(self.fields)


BIGDOCS = Schema(
    kind="bigdocs",
    unknown="this is no known BigDocs schema",
    # The configs of one release differ, and other sets of the same authors have the second names.
    fields={
        "id": ("sample_id", "identifier"),
        "queries": ("query", "queries"),
        "answers": ("annotations", "annotation"),
        "images": ("image", "images", "img_id"),
    },
)
# A file of text-only rows may lack the column `image`.
LLAVA = Schema(
    kind="llava",
    unknown="this is no known LLaVA schema",
    fields={"id": ("id",), "conversations": ("conversations",)},
)
VCR = Schema(
    kind="vcr",
    unknown="this is no known VCR-wiki schema",
    fields={"id": ("question_id",), "images": ("stacked_image",), "answers": ("crossed_text",)},
)
# Text-only samples have no image.
LINES = Schema(
    kind="jsonl",
    unknown="these are no lines of conversations",
    fields={"messages": ("messages",), "images": ("image", "images")},
)
SCHEMAS = (BIGDOCS, LLAVA, VCR, LINES)
_NEAR = 0.5
_LOOKED_AT = 256


def _nearest(columns: Collection[str], asked: Schema) -> str:
    others = sorted((schema for schema in SCHEMAS if schema is not asked), key=lambda schema: -schema.share(columns))
    best = others[0]
    if best.share(columns) <= max(_NEAR, asked.share(columns)):
        return "No other kind of `prepare` reads such columns either"
    return f"These are columns that `prepare {best.kind}` reads"
