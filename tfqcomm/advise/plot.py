"""A drawing of the step's time on links of many speeds."""

from __future__ import annotations

import importlib.util
import pathlib

from tfqcomm.advise.advice import Advice
from tfqcomm.costs.prediction import Link

RATES = tuple(10 ** (exponent / 10) for exponent in range(70, 111))  # 10 Mbit/s to 100 Gbit/s


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
