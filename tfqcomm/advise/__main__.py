"""Says which compressor to take for a model, and whether any pays.

    python -m tfqcomm.advise --model=module:build --workers=8 --bandwidth=1Gbps --latency=0.2ms
    python -m tfqcomm.launch --workers=2 --bandwidth=100mbit -m tfqcomm.advise --model=module:build

`build` is called without arguments and returns a Keras model, compiled or not; or (model, x, y); or
(model, data set of batches). It makes the model under no strategy. Without examples noise in the
shape of the inputs stands in, and the mean square of the outputs for the loss.

A step of the model is timed on this machine, and so is the exchange of its gradients with every
compressor. With a cluster in TF_CONFIG, as on a real one or under the launcher, so is the link
between its workers, all of which run this; otherwise it is what `--bandwidth` and `--latency` say,
behind what TensorFlow's own part takes on this machine. From that follow the bytes and the time of
a step with each, for the workers asked for, and the best for 2 to 1,024 of them.

With `--out` the tables go to advice.md there, one of them with the share of a step that is spent
computing, at 50 Mbit/s to 5 Gbit/s and with models exchanged every H steps; step.png shows the time
against the bandwidth, and map.png where which method is the fastest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import keras

from tfqcomm import compressors
from tfqcomm.advise import plot, run
from tfqcomm.advise.advice import Advice
from tfqcomm.advise.software import of_this_machine
from tfqcomm.cluster import Cluster
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.launch.units import bits_per_second, microseconds

WORLDS = tuple(2**i for i in range(1, 11))  # 2 to 1,024
RATES, PERIODS = ("50mbit", "200mbit", "1gbit", "5gbit"), (16, 128)  # of the utilisation
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        count, index = _cluster()
        # Before anything is done with TensorFlow, as a user's module may when it is imported.
        strategy = MultiWorkerMirroredStrategy() if count > 1 else None
        model, x, y = _parts(_function(options.model)())
        advice = run.report(
            model,
            x,
            y,
            workers=options.workers or max(2, count),
            bandwidth=options.bandwidth,
            latency=options.latency,
            batch_size=options.batch_size,
            compressors=_compressors(options.compressors),
            seconds=options.seconds,
            strategy=strategy,
            progress=_say if index == 0 else lambda text: None,
        )
    except ValueError as error:
        print(f"python -m tfqcomm.advise: {error}", file=sys.stderr)
        return USAGE_ERROR
    if index == 0:
        _show(advice, options)
    return 0


def _show(advice: Advice, options: argparse.Namespace) -> None:
    """Prints all there is, and writes it where the user wants it."""
    text = f"{advice}\n\n{advice.scaling(WORLDS)}"
    if not options.out:
        print(text)
        return
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    wait = 1e-6 * microseconds(options.latency or run.LATENCY)
    software = advice.software or of_this_machine()
    links = {rate: software.behind(bits_per_second(rate), wait) for rate in RATES}
    text += f"\n\nUtilisation, %:\n\n{advice.utilisation(links, PERIODS)}"
    print(text)
    (out / "advice.md").write_text(text + "\n")
    if plot.available():
        plot.draw(advice, software, wait, out / "step.png")
        plot.draw_map(advice, software, wait, out / "map.png")
    else:
        print("No plots: matplotlib is missing, which the extra `experiments` installs.")


def _function(name: str) -> Callable:
    """What `module:function` names.

    Raises:
        ValueError: if it names nothing that can be called.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Argument `--model` must be module:function. {error}. Received: --model={name}"
        ) from error
    return found


def _parts(built) -> tuple:
    """The model, and its examples and labels, or data set, if there are any."""
    model, x, y = (*built, None, None)[:3] if isinstance(built, tuple) else (built, None, None)
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Argument `--model` must name a function that returns a Keras model, (model, x, y) or "
            f"(model, data set). Received: {type(built).__name__}"
        )
    return model, x, y


def _cluster() -> tuple[int, int]:
    """Workers of the cluster in the environment, 1 without, and which of them this is."""
    cluster = Cluster.from_environment()
    if cluster is None:
        return 1, 0
    tasks = list(cluster.only("chief", "worker").tasks)
    return len(tasks), tasks.index(cluster.task)


def _compressors(names: str | None) -> Sequence:
    return run.COMPRESSORS if names is None else [compressors.get(n) for n in names.split(",")]


def _say(text: str) -> None:
    print(f"Measuring {text} ...", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tfqcomm.advise",
        description="Says which compressor to take for a model, and whether any pays.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="module:function that returns a Keras model")
    add("--workers", type=int, help="processes to predict for; default: those of the cluster, or 2")
    add("--bandwidth", help=f"of each worker, as in 1Gbps; default: {run.BANDWIDTH}, or measured")
    add("--latency", help=f"of a message, as in 0.2ms; default: {run.LATENCY}, or measured")
    add("--batch_size", type=int, default=32, help="examples per worker")
    add("--compressors", help="names, with commas; default: ten, from 16 bits to a thousandth")
    add("--seconds", type=float, default=1.0, help="for how long each part is timed, at about")
    add("--out", help="directory for the tables and two plots by bandwidth")
    return parser


if __name__ == "__main__":
    sys.exit(main())
