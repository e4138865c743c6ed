"""What is wrong with answers, counted by reason."""

MAX_NAMED = 5


class Faults:
    """Counts what is wrong by reason, and names the first of each."""

    def __init__(self) -> None:
        self._named: dict[str, dict[str, str]] = {}

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Count a fault; the same name under the same reason counts once."""
        self._named.setdefault(reason, {}).setdefault(name, f"{name} ({detail})" if detail else name)

    def lines(self) -> list[str]:
        """Return a line for each reason: count, reason, the first names."""
        return [
            f"{len(names)} {reason}: {', '.join(list(names.values())[:MAX_NAMED])}"
            f"{', …' if len(names) > MAX_NAMED else ''}"
            for reason, names in self._named.items()
        ]
