"""Plots of a study's report, as SVG files that are the same bytes for the same numbers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SETTINGS = {"svg.hashsalt": "alignvlm_pl", "svg.fonttype": "none", "font.size": 9}
Interval = tuple[float, float, float]
"""Value, low and high."""


def bars(path: Path, title: str, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    """Draw bars with intervals: group (a dataset) -> name (an arm) -> value, low and high."""
    with _axes(path, 1.2 + 0.34 * sum(len(one) + 1 for one in groups.values()), 3.2) as axes:
        start, ticks = 0.0, []
        colours = _colours({name for one in groups.values() for name in one})
        for group in groups.values():
            for name, (value, low, high) in group.items():
                axes.bar(start, value, 0.85, color=colours[name], yerr=[[value - low], [high - value]], capsize=2)
                ticks.append((start, name))
                start += 1
            start += 1
        axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], rotation=60, ha="right")
        axes.set_title(f"{title}: {', '.join(groups)}")


def radar(path: Path, title: str, axes_names: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Draw a polygon for each name over three or more axes, each scaled to its largest value."""
    angles = np.linspace(0, 2 * np.pi, len(axes_names), endpoint=False)
    largest = np.maximum(np.asarray(list(rows.values())).max(0), 1e-9)
    with _axes(path, 5, 4, polar=True) as axes:
        for name, values in rows.items():
            points = np.asarray(values) / largest
            axes.plot([*angles, angles[0]], [*points, points[0]], label=name, linewidth=1)
        axes.set_xticks(angles, axes_names)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
        axes.legend(loc="upper left", bbox_to_anchor=(1.1, 1.0), frameon=False)
        axes.set_title(title)


def lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    rows: Mapping[str, Sequence[tuple[float, Interval]]],
    *,
    log: bool = False,
) -> None:
    """Draw a line with a band for each name through (x, (value, low, high)); `log`: a logarithmic x axis."""
    with _axes(path, 5.4, 3.4) as axes:
        colours = _colours(set(rows))
        for name, points in rows.items():
            x = [place for place, _ in points]
            value, low, high = (np.asarray([one[part] for _, one in points]) for part in range(3))
            axes.plot(x, value, marker="o", markersize=3, label=name, color=colours[name])
            axes.fill_between(x, low, high, alpha=0.15, color=colours[name], linewidth=0)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        axes.set_title(title)


def points(path: Path, title: str, groups: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw (x, y) points of some groups over each other."""
    with _axes(path, 4.2, 3.4) as axes:
        for name, places in groups.items():
            axes.scatter([x for x, _ in places], [y for _, y in places], s=6, label=name, alpha=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        axes.set_title(title)


@contextmanager
def _axes(path: Path, width: float, height: float, *, polar: bool = False) -> Iterator[Any]:
    """Yield axes to draw on, of so many inches, that are saved at the end."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    with plt.rc_context(_SETTINGS):
        page, axes = plt.subplots(figsize=(width, height), layout="constrained", subplot_kw={"polar": polar})
        try:
            yield axes
            page.savefig(path, metadata={"Date": None})
        finally:
            plt.close(page)


def _colours(names: set[str]) -> dict[str, str]:
    return {name: f"C{index % 10}" for index, name in enumerate(sorted(names))}
