"""Plots, written as PNG files without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def plot_accuracy(
    path: str,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    title: str,
    *,
    sent: str = "bytes_sent",
) -> None:
    """Plots test accuracy against epochs and against what one worker has sent.

    Args:
        path: of the PNG file.
        runs: for each run's name the record of each epoch, as `training.train` returns it.
        title: of the figure.
        sent: of a record, what was sent: "bytes_sent" or "paper_bits".
    """
    unit = {"bytes_sent": "bytes sent by one worker [MB]", "paper_bits": "bits sent [Mbit]"}[sent]
    figure = Figure(figsize=(11, 4.2))
    by_epoch, by_traffic = figure.subplots(1, 2, sharey=True)
    for name, epochs in runs.items():
        accuracy = [100 * epoch["test_accuracy"] for epoch in epochs]
        total = np.cumsum([epoch[sent] for epoch in epochs]) / 1e6
        by_epoch.plot(range(1, len(epochs) + 1), accuracy, label=name)
        by_traffic.plot(total, accuracy, marker=".", label=name)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy [%]")
    by_traffic.set(xlabel=unit, xscale="log")
    top = max((100 * e["test_accuracy"] for epochs in runs.values() for e in epochs), default=100)
    by_epoch.set_ylim(max(0, top - 20), min(100, top + 1))
    by_traffic.legend(fontsize="small")
    _save(figure, path, title)


def plot_frontier(path: str, runs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> None:
    """Plots the test accuracy after the last epoch against all that one worker has sent.

    Args:
        path: of the PNG file.
        runs: for each method's name the record of each epoch, as `training.train` returns it.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    points = {
        name: (sum(e["bytes_sent"] for e in epochs) / 1e6, 100 * epochs[-1]["test_accuracy"])
        for name, epochs in runs.items()
    }
    for number, (name, point) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(*point, marker="o^sDv"[number // 10 % 5], linestyle="", label=name)
    top = max(accuracy for _, accuracy in points.values())
    axes.set(
        xlabel="bytes sent by one worker [MB]",
        ylabel="test accuracy [%]",
        xscale="log",
        ylim=(max(0, min(accuracy for _, accuracy in points.values()) - 1), top + 1),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    _save(figure, path, title)


def plot_test_loss(
    path: str, runs: Mapping[str, Sequence[Mapping[str, float]]], title: str
) -> None:
    """Plots the test loss against what one worker has sent.

    Args:
        path: of the PNG file.
        runs: for each method's name its records, as `training.train` returns them.
        title: of the figure.
    """
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for name, epochs in runs.items():
        total = np.cumsum([epoch["bytes_sent"] for epoch in epochs]) / 1e6
        axes.plot(total, [epoch["test_loss"] for epoch in epochs], marker="o", label=name)
    axes.set(xlabel="bytes sent by one worker [MB]", ylabel="test loss", xscale="log")
    axes.legend(fontsize="small")
    _save(figure, path, title)


def plot_speedup(path: str, runs: Sequence[Mapping[str, float]], title: str) -> None:
    """Plots iterations to the target loss against the number of workers, and linear speed-up.

    Args:
        path: of the PNG file.
        runs: dicts with `workers` and `iterations` (`None`: the target was not reached).
        title: of the figure.
    """
    reached = [run for run in runs if run["iterations"]]
    figure = Figure(figsize=(5.5, 4.2))
    axes = figure.subplots()
    if reached:
        workers = np.array([run["workers"] for run in reached])
        iterations = np.array([run["iterations"] for run in reached])
        axes.plot(workers, iterations, marker="o", label="measured")
        axes.plot(workers, iterations[0] * workers[0] / workers, "--", label="linear speed-up")
        axes.legend()
    axes.set(xlabel="workers", ylabel="iterations", xscale="log", yscale="log")
    axes.set_xticks([run["workers"] for run in runs], [str(run["workers"]) for run in runs])
    _save(figure, path, title)


def plot_sparsity(
    path: str, lines: Mapping[str, Sequence[tuple[float, float]]], title: str
) -> None:
    """Plots test accuracy against the share of weights that are exactly zero.

    Args:
        path: of the PNG file.
        lines: for each line's name its points, (share of zeros, test accuracy).
        title: of the figure.
    """
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*(100 * np.array(points).T), marker="o", label=name)
    axes.set(xlabel="weights that are exactly zero [%]", ylabel="test accuracy [%]")
    axes.legend(fontsize="small")
    _save(figure, path, title)


def plot_adaptive(path: str, runs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> None:
    """Plots test accuracy and training loss against bits, and what was kept against steps.

    Args:
        path: of the PNG file.
        runs: for each run's name its records, with `paper_bits` and `kept`, the mean entries kept.
        title: of the figure.
    """
    figure = Figure(figsize=(15, 4.2))
    by_accuracy, by_loss, by_step = figure.subplots(1, 3)
    for name, epochs in runs.items():
        line = "--" if "without" in name else "-"
        bits = np.cumsum([epoch["paper_bits"] for epoch in epochs]) / 1e6
        steps = np.cumsum([epoch["steps"] for epoch in epochs])
        by_accuracy.plot(bits, [100 * e["test_accuracy"] for e in epochs], line, label=name)
        by_loss.plot(bits, [epoch["train_loss"] for epoch in epochs], line)
        by_step.plot(steps, [epoch["kept"] for epoch in epochs], line)
    by_accuracy.set(xlabel="bits sent [Mbit]", ylabel="test accuracy [%]")
    by_accuracy.legend(fontsize="small")
    by_loss.set(xlabel="bits sent [Mbit]", ylabel="training loss", yscale="log")
    by_step.set(xlabel="step", ylabel="entries kept")
    _save(figure, path, title)


def plot_losses(
    path: str, runs: Mapping[str, np.ndarray], title: str, *, logarithmic: bool = False
) -> None:
    """Plots the loss of every worker against steps, one panel for each run.

    Args:
        path: of the PNG file.
        runs: for each run's name float[steps, workers].
        title: of the figure.
        logarithmic: for losses above zero.
    """
    figure = Figure(figsize=(3.6 * len(runs), 3.8))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, losses) in zip(panels, runs.items(), strict=True):
        axes.plot(np.asarray(losses))
        axes.set(xlabel="step", title=name, yscale="log" if logarithmic else "linear")
    panels[0].set_ylabel("loss of each worker")
    _save(figure, path, title)


def _save(figure, path, title):
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
