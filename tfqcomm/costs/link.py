"""The link between the workers, measured by collectives of the kinds that exchanges are made of."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfqcomm.costs.prediction import Line, Link, moves
from tfqcomm.transport.base import Transport

REPEATS = 7
SMALL = 2**6  # words: all of it is latency
LEAST, MOST = 2**16, 2**21  # words of the long ones, which tell the time of a byte ...
SECONDS = 0.3  # ... and should take no longer


def measure(transport: Transport) -> Link:
    """Times all-reduces, all-gathers and all-to-alls, short and long; a collective.

    Args:
        transport: to at least one other process.

    Returns:
        The same on all processes: that of the slowest.
    """
    kinds = {
        "all_reduce": lambda x: transport.all_reduce([x])[:1],
        "all_gather": lambda x: transport.all_gather([x])[:, :1],
        "all_to_all": lambda x: transport.all_to_all([tf.reshape(x, [transport.world, -1])])[0][:1],
    }
    words = _long(transport, kinds["all_reduce"])
    lines, processor = {}, 0.0
    for kind, collective in kinds.items():
        short, _ = _seconds(transport, collective, SMALL)
        wall, busy = _seconds(transport, collective, words)
        rounds, _ = _traffic(kind, SMALL, transport.world)
        _, sent = _traffic(kind, words, transport.world)
        lines[kind] = Line(short / rounds, max(0.0, wall - short) / sent)
        processor = max(processor, busy / sent)
    return Link(**lines, processor_seconds=processor)


def _traffic(kind: str, words: int, world: int) -> tuple[int, float]:
    """Rounds, and bytes that a worker sends."""
    schedule = {"all_reduce": "dense", "all_gather": "all_gather", "all_to_all": "two_phase"}[kind]
    _, rounds, sent = moves(schedule, 4 * words, world)[0]
    return rounds, sent


def _long(transport: Transport, collective: Callable) -> int:
    """Words of a message that takes long enough to be timed, and no longer."""
    words = LEAST
    while words < MOST and _seconds(transport, collective, words, 1)[0] < SECONDS / 2:
        words *= 2
    return words


def _seconds(transport, collective, words, repeats=REPEATS) -> tuple[float, float]:
    """Wall and processor time of the quickest of some; of all processes the longest."""
    words = -(-words // transport.world) * transport.world
    x = tf.zeros([words])
    # Not called as it is, which would warn of so many functions.
    run = tf.function(lambda x: collective(x + 1), autograph=False).get_concrete_function(x)
    wall, busy = [], []
    for _ in range(repeats + 1):
        start, used = time.perf_counter(), time.process_time()
        run(x).numpy()
        wall.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    own = np.array([min(wall[1:]), min(busy[1:])], np.float32)
    wall_seconds, processor_seconds = slowest(transport, own)
    return float(wall_seconds), float(processor_seconds)


def slowest(transport: Transport, values: np.ndarray) -> np.ndarray:
    """The largest of all processes' values: float32[n]; a collective."""
    return transport.gather_vectors(tf.constant(values, tf.float32)).numpy().max(axis=0)
