"""The graphs of a learner: its own step, an answer to the syncer, and a fragment that it takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfqcomm.parameter_server.cluster import Graphs
from tfqcomm.parameter_server.diloco.inner import InnerStep
from tfqcomm.parameter_server.diloco.server import DiLoCoServer, pack
from tfqcomm.parameter_server.gradients import all_finite, dense
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.model_step import ModelStep
from tfqcomm.parameter_server.payload import gradient_seeds


class DiLoCoProgram:
    """One for all learners.

    Args:
        model: built.
        inner: the step of the user's inner optimizer.
        servers: all of them.
        fragments: how many there are.
        loss_scale: by which losses are multiplied.

    Attributes:
        step: graphs of a step; `answers` and `takes` likewise, for each fragment.
    """

    def __init__(
        self,
        model: keras.Model,
        inner: InnerStep,
        servers: Sequence[DiLoCoServer],
        fragments: int,
        loss_scale: LossScale,
    ):
        self.inner = inner
        self._servers = list(servers)
        self.model_step = ModelStep(model)
        self._scaled = loss_scale.value is not None
        self.step = Graphs(self._step, kind_of=lambda iterator, *_: str(iterator.element_spec))
        self.answers = [Graphs(functools.partial(self._answer, f)) for f in range(fragments)]
        self.takes = [Graphs(functools.partial(self._take, f)) for f in range(fragments)]

    def servers_of(self, fragment: int) -> list[DiLoCoServer]:
        """Those that have something of it."""
        return [server for server in self._servers if server.has(fragment)]

    def _step(self, iterator, weights, state, statistics, local, metrics, rate, fresh, scale):
        """One local step.

        Args:
            iterator: of the learner's data.
            weights, state: its variables.
            statistics: variable, float32[s], of its own layers.
            local, metrics: as in `ModelStep.gradients`.
            rate: variable, the learning rate.
            fresh: bool scalar: the metrics begin anew.
            scale: float32 scalar, of the loss.

        Returns:
            What a `LearnerReport` is made of, float64[4 + metrics].
        """
        batch = keras.utils.unpack_x_y_sample_weight(next(iterator))
        metrics.assign(tf.where(fresh, self.model_step.metrics.initial, metrics.read_value()))
        before = statistics.read_value()
        gradients, moving, _ = self.model_step.gradients(
            [w.read_value() for w in weights],
            before,
            batch,
            local,
            metrics,
            scale if self._scaled else None,
        )
        norm = tf.linalg.global_norm(gradients)

        def update():
            full = dense(gradients, self.model_step.weights)
            pairs = zip(gradients, full, strict=True)
            own = [None if gradient is None else one for gradient, one in pairs]
            self.inner(weights, state, own, rate.read_value())
            return tf.constant(True)

        healthy = tf.cond(all_finite(gradients), update, lambda: tf.constant(False))
        finite = tf.reduce_all(tf.math.is_finite(moving))
        statistics.assign(tf.where(finite, moving, before))
        sane = tf.cond(healthy, lambda: tf.constant(True), lambda: _all_finite_in(weights))
        examples = tf.shape(tf.nest.flatten(batch[0])[0])[0]
        facts = tf.stack([tf.cast(fact, tf.float64) for fact in (healthy, sane, examples, norm)])
        return tf.concat([facts, metrics.read_value()], 0)

    def _answer(self, fragment, weights, anchors, inboxes, sender, number):
        """Gives each server how far the learner has come since it took a fragment.

        Args:
            weights, anchors: its own weights, and those of the servers that it took last.
            inboxes: its own, on each server that has something of the fragment.
            sender, number: int32 scalars, its index and its steps: they seed stochastic codecs.

        Returns:
            int32[2]: whether all of it is finite, and how many words were sent.
        """
        finite, sent = tf.constant(True), tf.constant(0)
        for server, inbox in zip(self.servers_of(fragment), inboxes, strict=True):
            format = server.formats[fragment]
            own = {p: tf.cast(weights[p.variable].read_value(), tf.float32) for p in format.pieces}
            values = {p: anchors[p.variable].read_value() - own[p] for p in format.pieces}
            encoded = format.up.encoded
            firsts = gradient_seeds(encoded, format.options, worker=0)
            seeds = {
                bucket: tf.stack([first ^ (sender * 0x5BD1E995), number])
                for bucket, first in zip(encoded, firsts, strict=True)
            }
            words = pack(format, values, seeds)
            server.keep(words, inbox)
            finite &= all_finite(list(values.values()))
            sent += tf.size(words)
        return tf.stack([tf.cast(finite, tf.int32), sent])

    def _take(self, fragment, weights, anchors, share):
        """Mixes the servers' weights of a fragment into the learner's own.

        Args:
            weights, anchors: its variables; the anchors become what the servers have.
            share: float32 scalar, of the servers' weights; of 1 its own count no more, whatever
                they are.

        Returns:
            How many words came.
        """
        received = 0
        for server in self.servers_of(fragment):
            for piece, theta in server.read(fragment).items():
                variable = weights[piece.variable]
                own = tf.cast(variable.read_value(), tf.float32)
                mixed = tf.where(share < 1, (1 - share) * own + share * theta, theta)
                variable.assign(tf.cast(mixed, variable.dtype))
                anchors[piece.variable].assign(theta)
                received += piece.size
        return tf.constant(received)


def _all_finite_in(variables) -> tf.Tensor:
    return all_finite([variable.read_value() for variable in variables])
