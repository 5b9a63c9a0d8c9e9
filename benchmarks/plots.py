"""Bars of what was measured on several networks, written as a PNG file without a display."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

WIDTH = 0.8  # of all bars of a group; groups are 1 apart


def bars(
    path: pathlib.Path,
    rows: Sequence[Mapping],
    *,
    group: str,
    bar: str,
    value: str,
    label: str,
    title: str,
) -> None:
    """Draws one bar for each row, on a logarithmic scale.

    Args:
        path: of the PNG file.
        rows: as a benchmark writes them to its JSON file.
        group: the key of what stands side by side.
        bar: the key of what a bar is called; the same colour in all groups.
        value: the key of its height, positive.
        label: of the axis, with the unit.
        title: of the figure.
    """
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys(row[bar] for row in rows))
    figure = Figure(figsize=(2 + 2.5 * len(groups), 4.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        found = {row[group]: row[value] for row in rows if row[bar] == name}
        places = np.array([groups.index(one) for one in found], float)
        places += WIDTH * ((number + 0.5) / len(names) - 0.5)
        drawn = axes.bar(places, list(found.values()), WIDTH / len(names), label=name)
        axes.bar_label(drawn, fmt=_three_digits, fontsize="x-small", rotation=90, padding=2)
    axes.set(yscale="log", ylabel=label, title=title)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.2)  # for what stands on the bars
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _three_digits(value: float) -> str:
    """Without an exponent: 5,640, 281 or 0.21."""
    return f"{float(f'{value:.3g}'):,.12g}"
