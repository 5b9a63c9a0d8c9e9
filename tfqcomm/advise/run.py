"""Measures a model and its exchanges, and predicts what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import checks, compressors, pages
from tfqcomm.advise import compute
from tfqcomm.advise.advice import Advice, Method
from tfqcomm.advise.software import of_this_machine
from tfqcomm.costs import exchange
from tfqcomm.costs import link as links
from tfqcomm.costs.prediction import Compute, Link
from tfqcomm.launch.units import bits_per_second, microseconds
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.transport.base import Transport
from tfqcomm.transport.of_strategy import transport_for

BANDWIDTH, LATENCY = "1gbit", "200us"  # where nothing is said of the network
COMPRESSORS = (
    compressors.Float16(),
    compressors.BFloat16(),
    compressors.Float8(),
    compressors.BlockInt8(),
    compressors.LogGrid(0),
    compressors.BlockSign(),
    compressors.TopK(0.01),
    compressors.TopK(0.001),
    compressors.RandomK(0.01),
    compressors.PowerSGD(4),
)


def report(
    model: keras.Model,
    x=None,
    y=None,
    *,
    workers: int,
    bandwidth: str | None = None,
    latency: str | None = None,
    batch_size: int = 32,
    compressors: Sequence = COMPRESSORS,
    seconds: float = 1.0,
    strategy: tf.distribute.Strategy | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Advice:
    """Measures a model's step and its exchanges on this machine, and predicts those of a cluster.

    The step is timed on all cores this process may use, and the exchange as well: the
    prediction is for workers that are each like this process. The model's weights, optimizer and
    metrics are as before afterwards; an optimizer's slots are made where they were not.

    Args:
        model: a Keras model, made outside of any strategy. If it is not compiled,
            `SGD(momentum=0.9)` is its optimizer.
        x: examples, or a `tf.data.Dataset` of batches; made up where there are none.
        y: labels; without them the mean square of the outputs stands in for the loss.
        workers: processes, W, 2 or more.
        bandwidth: of each worker, as in "1Gbps". Without it what the `strategy`'s collectives were
            measured to take, or 1 Gbit/s.
        latency: of a message, as in "0.2ms"; without it as for `bandwidth`, or 0.2 ms.
        batch_size: examples per worker.
        compressors: those to compare with dense training, or their names or configs.
        seconds: for how long each part is repeated, at about; longer => steadier.
        strategy: a multi-worker strategy, whose workers all call this: the link is then measured,
            and times are those of the slowest worker.
        progress: called with what is being measured.

    Returns:
        The advice: print it, or read its rows.

    Raises:
        ValueError: for arguments that do not fit.
    """
    checks.integer_between("workers", workers, 2, 2**20)
    checks.positive("seconds", seconds)
    checks.positive_integer("batch_size", batch_size)
    network = _network(bandwidth, latency)
    ways = _ways(compressors)
    transport = _transport_of(strategy)
    if transport is not None and network:
        raise ValueError(
            "Arguments `bandwidth` and `latency` must be None with a `strategy` of several "
            "workers, whose link is measured. "
            f"Received: bandwidth={bandwidth!r}, latency={latency!r}"
        )
    pages.keep()  # as a step under a strategy does
    progress("the link")
    link, origin, software = _link(network, transport)
    progress("the step")
    times, gradients = compute.measure(compute.prepare(model, x, y, batch_size), seconds)
    if transport is not None:
        parts = np.array([times.forward, times.backward, times.update], np.float32)
        times = Compute(*map(float, links.slowest(transport, parts)))
    methods = []
    for options in ways:
        progress(f"{options.compressor}, {options.schedule}")
        buckets = exchange.measure(options, gradients, seconds / 2)
        methods.append(_method(options, buckets))
    return Advice(
        model=model.name,
        parameters=sum(int(np.prod(g.shape)) for g in gradients),
        workers=workers,
        compute=times,
        link=link,
        origin=origin,
        methods=tuple(methods),
        software=software,
    )


def _network(bandwidth, latency) -> dict[str, float]:
    """What was said of it: bits per second, and seconds."""
    found = {}
    readers = (("bandwidth", bandwidth, bits_per_second), ("latency", latency, microseconds))
    for name, text, read in readers:
        if text is None:
            continue
        try:
            found[name] = float(read(text))
        except ValueError as error:
            raise ValueError(f"Argument `{name}` {error}. Received: {name}={text!r}") from None
    if "latency" in found:
        found["latency"] *= 1e-6
    return found


def _ways(candidates) -> list[ExchangeOptions]:
    """Dense training, and each compressor with each schedule that it can follow."""
    ways = [ExchangeOptions(compressors.get(None))]
    for candidate in map(compressors.get, candidates):
        if not candidate.lossless:
            allowed = exchange.schedules_for(candidate)
            ways += [ExchangeOptions(candidate, schedule=schedule) for schedule in allowed]
    return ways


def _method(options: ExchangeOptions, buckets) -> Method:
    if options.one_compressor.lossless:
        return Method(None, None, buckets)
    return Method(options.one_compressor, options.schedule, buckets)


def _transport_of(strategy) -> Transport | None:
    transport = None if strategy is None else transport_for(strategy)
    return transport if transport is not None and transport.processes > 1 else None


def _link(network: dict[str, float], transport: Transport | None) -> tuple[Link, str, Link | None]:
    """The link, where its figures come from, and what of it is not the network."""
    if transport is not None:
        link = links.measure(transport)
        rate, wait = 8e-6 / link.all_reduce.byte_seconds, 1e3 * link.all_gather.round_seconds
        origin = f"measured between {transport.processes} workers: {wait:.2f} ms a round, "
        return link, f"{origin}all-reduces at {rate:.0f} Mbit/s", None
    software = of_this_machine()
    assumed = [name for name in ("bandwidth", "latency") if name not in network]
    rate = network.get("bandwidth", float(bits_per_second(BANDWIDTH)))
    wait = network.get("latency", 1e-6 * microseconds(LATENCY))
    text = f"{rate / 1e6:g} Mbit/s, {1e3 * wait:g} ms"
    if assumed:
        text += f" (assumed: {' and '.join(assumed)}; give them, or start this on the cluster)"
    slowness = 1e3 * 1e6 * software.all_reduce.byte_seconds
    text += f"; TensorFlow's own part of an all-reduce: {slowness:.1f} ms a MB"
    return software.behind(rate, wait), text, software
