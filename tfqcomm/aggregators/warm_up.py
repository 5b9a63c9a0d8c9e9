"""Two ways for one group of messages, and a switch between them that is part of the graph."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator


class WarmUp:
    """Averages densely at first, and as `compressed` does from some step on.

        messages --> compresses? --+-- yes --> compressed.aggregate --+--> means, new residuals
                                   +-- no ---> dense.aggregate -------+--> means, the old ones

    Both are traced once, so that the switch needs no new trace. Of their collectives only those
    of the way that is taken run, so the switch must come at the same step on all replicas.

    Args:
        compresses: gives a bool scalar, equal on all replicas.
        compressed: what is used once it is true; keeps the residuals.
        dense: what is used until then; for the same tensors, without residuals.
    """

    def __init__(
        self, compresses: Callable[[], tf.Tensor], compressed: Aggregator, dense: Aggregator
    ):
        self._compresses = compresses
        self._compressed = compressed
        self._dense = dense

    def unpack(self, flat):
        """See `Aggregator.unpack`."""
        return self._compressed.unpack(flat)

    def aggregate(self, messages, healthy, step) -> Aggregate:
        """Averages the messages of all replicas: see `Aggregator.aggregate`."""
        compresses = self._compresses()
        if tf.executing_eagerly():
            way = self._compressed if compresses else self._dense
            return way.aggregate(messages, healthy, step)

        residuals: list[tf.Variable] = []

        def compressed():
            found = self._compressed.aggregate(messages, healthy, step)
            residuals.extend(variable for variable, _ in found.updates)
            return _outputs(found, [value for _, value in found.updates], found.left_out)

        def dense():  # traced behind the other, which has told what residuals there are
            found = self._dense.aggregate(messages, healthy, step)
            values = [variable.read_value() for variable in residuals]
            return _outputs(found, values, self._compressed.owed())

        means, all_healthy, sent, values, left_out = tf.cond(compresses, compressed, dense)
        updates = list(zip(residuals, values, strict=True))
        return Aggregate(means, all_healthy, updates, sent, left_out)


def _outputs(found, values, left_out):
    sent = tf.cast(found.bytes_sent, tf.int64)
    return list(found.means), found.healthy, sent, values, list(left_out)
