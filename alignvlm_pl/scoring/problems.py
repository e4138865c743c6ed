"""Problems of predictions: a short line by reason for reports, and all that it counts for `problems.json`."""

from collections.abc import Iterable, Mapping, Sequence

from alignvlm_pl.utils.atomic_files import printable

MAX_NAMED = 5


class Problem(str):
    """A line of a report, and in `items` the text of everything that it counts."""

    items: tuple[str, ...]

    def __new__(cls, line: str, items: Iterable[str] = ()) -> "Problem":
        """Return a line with its items."""
        problem = super().__new__(cls, printable(line))
        problem.items = tuple(map(printable, items))
        return problem


def problems_by_reason(messages: Mapping[str, Iterable[str]]) -> list[Problem]:
    """Return a line for each reason, from its messages as in `SkippedSamples`; equal ones count once."""
    unique = {reason: list(dict.fromkeys(found)) for reason, found in messages.items()}
    return [
        Problem(
            f"{len(found)} {reason}: {', '.join(found[:MAX_NAMED])}{', …' if len(found) > MAX_NAMED else ''}", found
        )
        for reason, found in unique.items()
        if found
    ]


def problem_lists(problems: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, object]]]:
    """Return the content of `problems.json`: for each dataset its problems, each with all that it counts."""
    return {
        name: [{"problem": str(line), "items": list(getattr(line, "items", ()))} for line in lines]
        for name, lines in problems.items()
        if lines
    }
