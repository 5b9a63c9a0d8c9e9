"""One parameter server: float32 weights, the optimizer's shared state, and what workers pull.

inboxes --> mean of the decoded messages --> `optimizer.apply` --> outbox, encoded once per step

All of it lives and runs on the server's device. A pull reads the outbox alone, so that it sees one
version of the weights, also while others push.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.aggregators.vectors import decode_mean, split_words
from tfqcomm.compressors.identity import Identity
from tfqcomm.parameter_server.cluster import Graphs, on
from tfqcomm.parameter_server.optimizers import server_optimizer, server_variable, slots_of
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format
from tfqcomm.parameter_server.rows import ServerRows


class Server:
    """The pieces of one parameter server.

    Args:
        device: of the server.
        format: what lives there, and how it travels.
        values: the weights, for each piece.
        wholes: for each piece, the model's variable that it is of.
        statistics: float32[s].
        optimizer: the user's; this server gets one of its own like it.
        share: of one message in a step: 1 if the messages of all workers are averaged first.
        rows: of tables, that live on this server, too.

    Attributes:
        optimizer: with this server's slots.
        variables: the float32 weights.
        untouched: pieces that have no gradient: a step leaves them alone.
        inboxes: one for each worker, int32[w].
        outbox: what workers pull, int32[most words]; its first word says how many count.
    """

    def __init__(
        self,
        device: str,
        format: Format,
        values: Sequence[np.ndarray],
        wholes: Sequence[keras.Variable],
        statistics: np.ndarray,
        optimizer: keras.optimizers.Optimizer,
        workers: int,
        share: float,
        rows: ServerRows,
    ):
        self.device = device
        self.format = format
        self.rows = rows
        self._share = share
        self.untouched: frozenset[Piece] = frozenset()
        with on(device):
            self.optimizer = server_optimizer(optimizer, share)
            self.variables = [
                server_variable(value, whole, piece.name)
                for piece, value, whole in zip(format.pieces, values, wholes, strict=True)
            ]
            excluded = [
                variable
                for variable, whole in [*zip(self.variables, wholes, strict=True), *rows.working]
                if not _tf_private.may_decay(optimizer, whole)
            ]
            self.optimizer.exclude_from_weight_decay(excluded)
            self.optimizer.build([*self.variables, *(variable for variable, _ in rows.working)])
            rows.keep_slots(self.optimizer)
            self.statistics = tf.Variable(statistics, trainable=False)
            self.outbox = tf.Variable(tf.zeros([format.most_pull_words], tf.int32), trainable=False)
            empty = tf.zeros([sum(format.push_lengths)], tf.int32)
            self.inboxes = [tf.Variable(empty, trainable=False) for _ in range(workers)]
        self._graph_step = Graphs(self._step, kind_of=lambda inboxes, _: len(inboxes))
        self._graph_publish = Graphs(self._publish)

    def step(self, workers: Sequence[int]) -> None:
        """One step with the mean of what these workers have pushed."""
        with on(self.device):
            rows = [self.rows.of_worker(w) for w in workers]
            self._graph_step([self.inboxes[w] for w in workers], rows)

    def publish(self) -> None:
        """Fills the outbox, after the weights were changed from outside."""
        with on(self.device):
            self._graph_publish()

    def held(self) -> dict[Piece, list]:
        """For each piece, of tables too, its variable and the optimizer's slots."""
        slots = slots_of(self.optimizer)[1]
        pairs = zip(self.format.pieces, self.variables, strict=True)
        pieces = {piece: [variable, *slots.get(piece.name, [])] for piece, variable in pairs}
        return pieces | self.rows.held()

    def ping(self) -> None:
        """Raises `tf.errors.OpError` if the server does not answer."""
        with on(self.device):
            self.optimizer.iterations.numpy()

    def _step(self, inboxes, pushed_rows):
        """The graph of `step`, one for each number of workers that take part.

        Traced after a worker's step, which says what has a gradient.
        """
        words = tf.stack([inbox.read_value() for inbox in inboxes])  # [workers, w]
        *messages, rest = split_words(words, self.format.push_lengths)
        compressor = self.format.options.compressor
        means = {
            piece: tf.reshape(decode_mean(compressor, message, piece.size), piece.shape)
            for piece, message in zip(self.format.large, messages, strict=True)
        }
        dense, statistics = self.format.unpack_rest(decode_mean(Identity(), rest, rest.shape[-1]))
        means |= dense
        pairs = [
            (means[piece] * self._share, variable)
            for piece, variable in zip(self.format.pieces, self.variables, strict=True)
            if piece not in self.untouched
        ]
        pairs += self.rows.begin(pushed_rows, self._share)
        if pairs:
            self.optimizer.apply(*zip(*pairs, strict=True))
            self.rows.end()
        else:  # a version all the same: workers go by the oldest that they pull
            self.optimizer.iterations.assign_add(1)
        self.statistics.assign_add(statistics * self._share)
        self._publish()

    def _publish(self):
        weights = {
            piece: tf.convert_to_tensor(variable)
            for piece, variable in zip(self.format.pieces, self.variables, strict=True)
        }
        words = self.format.pack_weights(
            weights, self.statistics.read_value(), self.optimizer.iterations.value
        )
        missing = self.format.most_pull_words - tf.size(words)
        words = tf.pad(words, [[0, missing]])
        self.outbox.assign(tf.ensure_shape(words, self.outbox.shape))

    def pulled(self) -> tf.Tensor:
        """The words of a pull, in a worker's graph: what is computed here stays on the server."""
        with tf.device(self.device):
            words = self.outbox.read_value()
            return words[: words[0]]
