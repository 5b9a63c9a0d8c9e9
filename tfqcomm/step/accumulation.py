"""Gradient accumulation: k batches of a replica for each exchange.

    batch     1      2      3      4      5     ...       accumulate = 4
    sum       g1   + g2   + g3   + g4     g5    ...       on each replica, nothing is sent
    step                           sum / 4                exchange, worker's half, server's half

So a step is that of a batch k times larger, and what counts steps counts exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.step.exchange import GradientExchange

Gradients = Sequence[tf.Tensor | tf.IndexedSlices]  # of one variable, on each local replica


class BatchCount:
    """A keeper of the ledger: how many batches have been added up since the last exchange.

    Args:
        keys: of the variables whose gradients they are.
    """

    def __init__(self, keys: Sequence[str]):
        self.keys = tuple(keys)
        self.variable = _tf_private.local_variable(np.int64(0), name="batches", device="CPU:0")

    def state(self) -> dict[str, np.ndarray]:
        """What a backup keeps."""
        return {"batches": self.variable.numpy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`; now, not in every step of a graph that is being traced."""
        with tf.init_scope():
            self.variable.assign(state.get("batches", 0))


def take_every(
    exchange: GradientExchange,
    keys: Sequence[str],
    gradients: Sequence[Gradients],
    take: Callable[[Sequence[Gradients]], None],
    hold: Callable[[], None],
) -> None:
    """Calls `take` with the mean gradients of `accumulate` batches, once there are so many.

    The sums begin anew also where `take` skips its step: of a sum that is not finite nothing can be
    saved.

    Args:
        gradients: of this batch, for each variable.
        take: exchanges and updates.
        hold: called in place of it where batches are missing.
    """
    every, ledger = exchange.options.accumulate, exchange.ledger
    if every == 1:
        take(gradients)
        return
    count = ledger.keep("accumulation", lambda: BatchCount(keys))
    if count.keys != tuple(keys):
        raise ValueError(
            "An optimizer that accumulates gradients must train the same variables at every step. "
            f"Received: {len(keys)} variables after {len(count.keys)}"
        )
    sums = [_sums(exchange, key, found) for key, found in zip(keys, gradients, strict=True)]
    pairs = [pair for of in zip(sums, gradients, strict=True) for pair in zip(*of, strict=True)]

    def add():
        for slot, gradient in pairs:
            _add(slot, gradient)
        count.variable.assign_add(1)
        hold()
        return tf.constant(False)

    def step():
        take([_means(exchange, *of, every) for of in zip(sums, gradients, strict=True)])
        for slot, _ in pairs:
            slot.assign(tf.zeros_like(slot))
        count.variable.assign(0)
        return tf.constant(True)

    tf.cond(count.variable + 1 < every, add, step)


def _sums(exchange: GradientExchange, key: str, gradients: Gradients) -> list[tf.Variable]:
    """One for each local replica, of the variable's shape: dense also for embeddings."""
    memory, found = exchange.ledger.worker_state, []
    for replica, gradient in enumerate(gradients):
        found.append(
            memory.variable(replica, "accumulated", key, gradient.shape, 0.0, gradient.dtype)
        )
    return found


def _add(slot: tf.Variable, gradient: tf.Tensor | tf.IndexedSlices) -> None:
    with tf.device(slot.device):
        if isinstance(gradient, tf.IndexedSlices):
            slot.scatter_add(gradient)
        else:
            slot.assign_add(gradient)


def _means(exchange, slots, gradients, every) -> list[tf.Tensor | tf.IndexedSlices]:
    """Of the batches before and this one, for each local replica."""
    means = []
    for slot, gradient, device in zip(slots, gradients, exchange.transport.devices, strict=True):
        with tf.device(device):
            if isinstance(gradient, tf.IndexedSlices):
                _add(slot, gradient)
                means.append(_rows(slot, 1 / every))
            else:
                means.append((slot + gradient) * (1 / every))
    return means


def _rows(slot: tf.Variable, share: float) -> tf.IndexedSlices:
    """Those rows of a sum that are not zero, each once, so that embeddings stay sparse."""
    total = tf.convert_to_tensor(slot)
    filled = tf.reduce_any(tf.not_equal(total, 0), axis=list(range(1, total.shape.rank)))
    indices = tf.where(filled)[:, 0]
    values = tf.gather(total, indices) * share
    return tf.IndexedSlices(values, indices, tf.constant(slot.shape.as_list(), tf.int64))
