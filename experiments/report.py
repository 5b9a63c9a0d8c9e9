"""Results in words and in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from absl import flags

from experiments import training

SLOW_NETWORK = 100e6  # bits per second


def write_results(out: str, settings: Sequence[flags.FlagHolder], runs) -> None:
    """Writes what was asked, what it may depend on, and what came out to `out`/results.json."""
    os.makedirs(out, exist_ok=True)
    record = {
        "settings": {flag.name: flag.value for flag in settings},
        "versions": training.versions(),
        "runs": runs,
    }
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump(record, file, indent=1)


def summary(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of one line of the table.

    Args:
        epochs: the record of each, as `training.train` returns it. The first, in which TensorFlow
            compiles, is not timed.
    """
    timed = epochs[1:] or epochs
    sent, dense, steps = (
        sum(epoch[key] for epoch in epochs) for key in ("bytes_sent", "dense_bytes", "steps")
    )
    return {
        "test_accuracy": epochs[-1]["test_accuracy"],
        "bytes_per_worker_and_step": sent / steps,
        "ratio": dense / sent if sent else 1.0,
        "seconds_per_step": sum(e["train_seconds"] for e in timed) / sum(e["steps"] for e in timed),
    }


def served_epochs(
    traffic: Sequence[Mapping[str, float]], history: Mapping[str, Sequence[float]]
) -> list[dict[str, float]]:
    """The record of each epoch of a parameter-server run: its traffic, test accuracy and loss."""
    return [
        {**record, "test_accuracy": accuracy, "loss": loss}
        for record, accuracy, loss in zip(
            traffic, history["val_accuracy"], history["loss"], strict=True
        )
    ]


def up_and_down(runs: Mapping[str, Mapping]) -> dict[str, list[dict[str, float]]]:
    """The epochs of parameter-server runs for a plot: sent is what was pushed or pulled."""
    return {
        name: [{**e, "bytes_sent": e["bytes_sent"] + e["bytes_pulled"]} for e in run["epochs"]]
        for name, run in runs.items()
    }


def table(metrics: Mapping) -> str:
    """The table of the main job; with utilisation where one worker was timed alone."""
    alone = metrics.get("alone_seconds_per_step")
    header = ["run", "test accuracy", "bytes per worker and step", "ratio", "s per step"]
    rows = [header] + [
        [
            run["title"],
            f"{run['test_accuracy']:.2%}",
            f"{run['bytes_per_worker_and_step']:,.0f}",
            f"{run['ratio']:.1f}x",
            f"{run['seconds_per_step']:.4f}",
        ]
        for run in metrics["runs"].values()
    ]
    if alone:
        header.append("utilisation")
        for row, run in zip(rows[1:], metrics["runs"].values(), strict=True):
            row.append(f"{alone / run['seconds_per_step']:.0%}")
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose first row is the header, aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _aligned(row, widths):
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def report(metrics: Mapping) -> str:
    """The text of report.md."""
    settings, runs = metrics["settings"], metrics["runs"]
    first = next(iter(runs.values()))
    return f"""# Dense and compressed training, {settings["dataset"]}, {settings["workers"]} workers

{table(metrics)}

{first["parameters"]:,} parameters, {len(first["epochs"])} epochs. Every run starts from the same
weights and sees the same batches. Test accuracy after the last epoch; one run, one seed.

- Bytes: what one worker sends in exchanges of gradients. Ratio: the bytes of a float32 ring
  all-reduce of the same gradients over those sent.
- {_about_seconds(metrics)}
- Both dense runs send the same. Compare compressed Adam with dense Adam, and compressed COMP-AMS
  with dense COMP-AMS: then compression is all that differs.

![Test accuracy against epochs and against bytes sent](accuracy.png)

TensorBoard: `tensorboard --logdir` with the directory `tensorboard` beside this file.
"""


def _about_seconds(metrics: Mapping) -> str:
    settings, runs = metrics["settings"], metrics["runs"]
    if alone := metrics.get("alone_seconds_per_step"):
        said = [f"{name} {settings[name]}" for name in ("bandwidth", "latency") if settings[name]]
        return f"""Seconds: every worker has a network interface of its own, {", ".join(said)};
  all share the processors of this machine; the first epoch is left out. Utilisation: the step of
  one worker alone, {alone:.4f} s, over that of the run."""
    dense = max(run["bytes_per_worker_and_step"] for run in runs.values())
    return f"""Seconds: on this machine, where the network costs next to nothing and all workers
  share the processors; the first epoch is left out. At {SLOW_NETWORK / 1e6:.0f} Mbit/s sending the
  dense gradients would add {dense * 8 / SLOW_NETWORK:.3f} s to every step; divide by the ratio for
  the others."""
