"""Tables of a release, drawn when a row of BigDocs names one."""

from dataclasses import dataclass, field

from ...shards.sample import SampleError
from ..sources.pictures import Picture
from .table_questions import LoadTable, TableNames
from .tables import render, to_png

_KEPT = 32
"""Drawn tables that are kept: rows about one table often follow one another."""
_TABLE_BYTES = 100_000
"""Pages of a table of Wikipedia, about."""


@dataclass(frozen=True, kw_only=True)
class RenderedTables:
    """Pages by the name of their table.

    Attributes:
        names: Tables of the release.
        load: Gives a table by its name.
    """

    names: TableNames = field(repr=False)
    load: LoadTable
    _drawn: dict[str, list[Picture]] = field(default_factory=dict, repr=False, compare=False)

    def named(self, name: str, *, where: str) -> list[Picture]:
        """Return the pages of a table.

        Raises:
            SampleError: The release has no such table (``unknown_table``), or it cannot be drawn.
        """
        table = self.names.find(name)
        if table is None:
            raise SampleError(f"{where}: img_id {name!r:.120} names no table of the release", "unknown_table")
        if table not in self._drawn:
            try:
                pages: list[Picture] = [(to_png(page), "png") for page in render(self.load(table))]
            except SampleError as error:
                raise SampleError(f"{where}: {error}", error.reason) from error
            if len(self._drawn) >= _KEPT:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[table] = pages
        return self._drawn[table]

    def estimate(self) -> tuple[int, int]:
        """Estimate the bytes of all pages, and of those that are held nowhere else: all."""
        size = len(self.names.whole) * _TABLE_BYTES
        return size, size
