"""Problems of predictions, counted by reason: a short line for reports, and all names for `problems.json`."""

from collections.abc import Iterable, Mapping, Sequence

from alignvlm_pl.utils.atomic_files import printable

MAX_NAMED = 5


class Problem(str):
    """A line of a report, which names a few of the things it counts and remembers them all.

    Attributes:
        items: Everything that the line counts, in words; empty where it is about no single things.
    """

    items: tuple[str, ...]

    def __new__(cls, line: str, items: Iterable[str] = ()) -> "Problem":
        """Make a line that remembers its items."""
        problem = super().__new__(cls, printable(line))
        problem.items = tuple(map(printable, items))
        return problem


class Faults:
    """Counts what is wrong by reason, and names the first of each."""

    def __init__(self) -> None:
        self._named: dict[str, dict[str, str]] = {}

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Count a fault; the same name under the same reason counts once."""
        self._named.setdefault(reason, {}).setdefault(name, f"{name} ({detail})" if detail else name)

    def lines(self) -> list[Problem]:
        """Return a line for each reason: count, reason, the first names."""
        return [
            Problem(
                f"{len(names)} {reason}: {', '.join(list(names.values())[:MAX_NAMED])}"
                f"{', …' if len(names) > MAX_NAMED else ''}",
                names.values(),
            )
            for reason, names in self._named.items()
        ]


def problem_lists(problems: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, object]]]:
    """Return the content of `problems.json`: for each dataset its problems, each with all that it counts.

    Args:
        problems: Name of the dataset -> its problems.
    """
    return {
        name: [{"problem": str(line), "items": list(getattr(line, "items", ()))} for line in lines]
        for name, lines in problems.items()
        if lines
    }
