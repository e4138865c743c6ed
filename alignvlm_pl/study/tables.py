"""Tables of a report, in Markdown."""

from collections.abc import Sequence

from .statistics import Estimate


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def interval(one: Estimate | None, *, sign: bool = False) -> str:
    """Print a mean and its interval; a dash for None."""
    if one is None:
        return "–"
    mark = "+" if sign else ""
    return f"{one.mean:{mark}.3f} ({one.low:{mark}.3f} to {one.high:{mark}.3f})"
