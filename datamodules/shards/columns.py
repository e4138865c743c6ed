"""Names that the columns of published tables have, by kind of source (no torch here)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from alignvlm_pl.errors import DataError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """Columns of one kind of source: the kind of `prepare` that reads it, and what is said of other columns.

    `fields` are field -> names that its column may have, in order of preference.
    """

    kind: str
    unknown: str
    fields: Mapping[str, tuple[str, ...]]

    def resolve(self, columns: Collection[str], *, where: str, fields: Sequence[str] | None = None) -> dict[str, str]:
        """Return the column of each field, or of those in `fields`; DataError: one has none in the table `where`."""
        found = {}
        for field in fields or tuple(self.fields):
            column = next((name for name in self.fields[field] if name in columns), None)
            if column is None:
                raise DataError(self._unknown(columns, field, where))
            found[field] = column
        return found

    def check_records(self, records: Iterable[Any], field: str, *, where: str) -> None:
        """Raise the DataError of `resolve` where none of the first records of the file `where` has a field."""
        first = [record for record in islice(records, CHECKED_RECORDS) if isinstance(record, Mapping)]
        if first and not any(name in record for name in self.fields[field] for record in first):
            self.resolve([str(name) for name in first[0]], where=where, fields=(field,))

    def _unknown(self, columns: Collection[str], field: str, where: str) -> str:
        expected = ", ".join(" or ".join(names) for names in self.fields.values())
        found = nearest(self.fields[field][0], columns).replace("known:", "found:")
        best = max((schema for schema in SCHEMAS if schema is not self), key=lambda schema: schema.share(columns))
        is_near = best.share(columns) > max(_NEAR, self.share(columns))
        reader = f"These are columns that `prepare {best.kind}` reads"
        return (
            f"{where}: no column {' or '.join(self.fields[field])}; {self.unknown} ({found}). Expected: {expected}. "
            + (reader if is_near else "No other kind of `prepare` reads such columns either")
        )

    def share(self, columns: Collection[str]) -> float:
        """Return how many of the fields have a column, from 0 to 1."""
        return sum(any(name in columns for name in names) for names in self.fields.values()) / len(self.fields)


BIGDOCS = Schema(
    kind="bigdocs",
    unknown="this is no known BigDocs schema",
    # The names differ between the configs of one release.
    fields={
        "id": ("sample_id", "identifier"),
        "queries": ("query", "queries"),
        "answers": ("annotations", "annotation"),
        "images": ("image", "images", "img_id"),
    },
)
LLAVA = Schema(
    kind="llava",
    unknown="this is no known LLaVA schema",
    fields={"id": ("id",), "conversations": ("conversations",)},
)
LISTS = replace(LLAVA, fields={"conversations": ("conversations", "messages")})
VCR = Schema(
    kind="vcr",
    unknown="this is no known VCR-wiki schema",
    fields={"id": ("question_id",), "images": ("stacked_image",), "answers": ("crossed_text",)},
)
LINES = Schema(
    kind="jsonl",
    unknown="these are no lines of conversations",
    fields={"messages": ("messages", "conversations"), "images": ("image", "images")},
)
SCHEMAS = (BIGDOCS, LLAVA, VCR, LINES)
_NEAR = 0.5
CHECKED_RECORDS = 256
