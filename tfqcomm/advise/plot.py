"""Drawings for links of many speeds: the step's time, and which method is the fastest."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

from tfqcomm.advise.advice import Advice
from tfqcomm.costs.prediction import Link

RATES = tuple(10 ** (exponent / 10) for exponent in range(70, 111))  # 10 Mbit/s to 100 Gbit/s
STEPS = tuple(10 ** (exponent / 10) for exponent in range(-30, 11))  # seconds alone, 1 ms to 10 s


def available() -> bool:
    """Whether there is matplotlib, of the extra `experiments`."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(advice: Advice, software: Link, latency: float, path: pathlib.Path) -> None:
    """Writes a PNG: a line for each method with its best schedule.

    Args:
        advice: of the workers it was made for.
        software: the link without its network.
        latency: of the network, seconds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times: dict[str, list[float]] = {}
    for rate in RATES:
        best: dict[str, float] = {}
        for row in advice.rows(link=software.behind(rate, latency)):
            best.setdefault(str(row.method), row.prediction.seconds)
        for name, value in best.items():
            times.setdefault(name, []).append(1e3 * value)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in sorted(times.items()):
        dense = name == str(advice.dense().method)
        axes.loglog(RATES, values, label=name, color="black" if dense else None)
    axes.axhline(1e3 * advice.compute.seconds, color="gray", linestyle=":", label="one alone")
    axes.set(xlabel="bandwidth, bit/s", ylabel=f"step of {advice.workers} workers, ms")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def draw_map(advice: Advice, software: Link, latency: float, path: pathlib.Path) -> None:
    """Writes a PNG: which method is the fastest, by bandwidth and by the step of a worker alone.

    The exchange is the model's own, and the step is as much longer or shorter as a larger batch, a
    faster processor or more computation for each weight makes it. Dense training has the place
    where no compressor is 5% faster.

    Args:
        advice, software, latency: as of `draw`.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    links = [software.behind(rate, latency) for rate in RATES]
    names: list[str] = []
    cells = np.zeros([len(STEPS), len(RATES)], int)
    for y, seconds in enumerate(STEPS):
        scaled = dataclasses.replace(advice, compute=advice.compute.scaled_to(seconds))
        for x, link in enumerate(links):
            name = str(scaled.best(link=link).method)
            if name not in names:
                names.append(name)
            cells[y, x] = names.index(name)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = colormaps["tab20"]  # in which light and dark ones alternate
    of_names = np.array([2 * n % colors.N + 2 * n // colors.N for n in range(len(names))])
    axes.pcolormesh(RATES, STEPS, of_names[cells], cmap=colors, vmin=-0.5, vmax=colors.N - 0.5)
    line = axes.axhline(advice.compute.seconds, color="black", linestyle=":", label="as measured")
    axes.set(xscale="log", yscale="log", xlabel="bandwidth, bit/s", ylabel="step alone, s")
    axes.set_title(f"The fastest of all, {advice.workers} workers")
    patches = [
        Patch(color=colors(int(color)), label=name)
        for color, name in zip(of_names, names, strict=True)
    ]
    figure.legend(handles=[*patches, line], loc="outside lower center", fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
