"""One parameter server: float32 weights, the optimizer's shared state, and what workers pull.

    messages --> mean of the decoded ones --> `optimizer.apply` --> weights
    outbox   <-- encoded, when a worker pulls a version that is not there yet <--

All of it lives and runs on the server's device. Steps and pulls take turns, under the server's own
lock: a pull sees one version of the weights, also while others push. What arrives is decoded
before the lock is taken. Who waits for it must not block a thread of the server's, of which there
are few: so whatever takes it is called as an `Errand`. In rounds, messages wait in inboxes until
the chief asks for a step; else a worker's graph ends with the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.kernels import wire
from tfqcomm.parameter_server.buckets import decode_mean, mean_of
from tfqcomm.parameter_server.cluster import Errand, Graphs, on
from tfqcomm.parameter_server.embeddings import ServerRows
from tfqcomm.parameter_server.optimizers import server_optimizer, server_variable, slots_of
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format, unpack_rest

NEVER = np.int64(-1)  # a version that no server has


class Server:
    """The pieces of one parameter server.

    Args:
        device: of the server.
        format: what lives there, and how it travels.
        values: the weights, for each piece.
        wholes: for each piece, the model's variable that it is of.
        statistics: float32[s].
        optimizer: the user's; this server gets one of its own like it.
        workers: how many send messages.
        share: of one message in a step: 1 if the messages of all workers are averaged first.
        inboxes: whether messages wait there for a step.
        rows: of tables, that live on this server, too.

    Attributes:
        optimizer: with this server's slots.
        variables: the float32 weights.
        untouched: pieces that have no gradient: a step leaves them alone.
        inboxes: for each worker int32[w]; rows, serialized, since no task may be told of a variable
            of unknown shape; and what travels alone. None where messages do not wait.
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
        inboxes: bool,
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
            self._encoded = tf.Variable(NEVER, trainable=False)  # version of the outbox
            # For each worker the number of its last message that was taken.
            self._taken = tf.Variable(tf.zeros([workers], tf.int64), trainable=False)
            empty = tf.zeros([sum(format.push_lengths)], tf.int32)
            count = workers if inboxes else 0
            no_rows = tf.io.serialize_tensor(tf.zeros([0], tf.int32))
            alone = [tf.zeros(piece.shape) for piece in format.up.alone]
            self.inboxes = [
                [tf.Variable(value, trainable=False) for value in (empty, no_rows, *alone)]
                for _ in range(count)
            ]
            self._lock = tf.CriticalSection(name=f"server_{id(self)}")
        # Graphs of their own within a worker's, where TensorFlow would release locks in turn.
        self._graph_pull, self._graph_take = Graphs(self._pull), Graphs(self._take)
        step = Graphs(self._step, kind_of=lambda inboxes, _: len(inboxes))
        self._run_step = Errand(step, device)
        self._run_settle = Errand(Graphs(self._settle), device)

    def step(self, workers: Sequence[int]) -> None:
        """One step with the mean of what these workers have pushed."""
        self._run_step([self.inboxes[w] for w in workers], tf.constant(workers))

    def settle(self, worker: int, number: int) -> int:
        """The number of the last message of a worker that was taken; no more are, up to `number`.

        Of a worker that is lost the last message may have arrived, or may still be under way.
        """
        return int(self._run_settle(tf.constant(worker), tf.constant(number, tf.int64)))

    def outdate(self) -> None:
        """What was encoded counts no more, after the weights were changed from outside."""
        with on(self.device):
            self._encoded.assign(NEVER)

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

    def pulled(self) -> list[tf.Tensor]:
        """The words of a pull, and what travels alone: computed on the server, for a worker."""
        with tf.device(self.device):
            words, *alone = self._graph_pull()
            return [words if self.format.pulls_alike else words[: words[0]], *alone]

    def take(self, words, alone, worker, number, healthy) -> tf.Tensor:
        """A step with one message, in the graph of the worker that sends it; each message once.

        Traced after the worker's gradients, which say what has none.

        Args:
            words: int32[w and more]: then those of rows.
            alone: float32 tensors of the pieces that travel so.
            worker: int32 scalar, its index.
            number: int64 scalar, of the message; the worker's next one has a larger number.
            healthy: bool scalar: if False, the message is not taken.

        Returns:
            int64 scalar: how many steps the server had taken before; -1 if it has not taken this
            message, or had it already.
        """
        # In one tensor, since each that crosses to another task is a call of its own.
        header = tf.stack([tf.cast(fact, tf.int64) for fact in (worker, number, healthy)])
        with tf.device(self.device):
            return self._graph_take(words, alone, header)

    def _take(self, words, alone, header):
        words, rows = self._apart(words)
        means, statistics = self._means(tf.expand_dims(words, 0), [[value] for value in alone])
        worker, number, healthy = tf.unstack(header)
        pushed = [(tf.cast(worker, tf.int32), self.rows.format.unpack(rows))]

        def step():
            before = self._version()
            self._apply(means, statistics, pushed)
            self._taken.scatter_nd_update([[worker]], [number])
            return before

        def take_new():
            new = self._taken.read_value()[worker] < number
            return tf.cond((healthy > 0) & new, step, lambda: tf.constant(-1, tf.int64))

        return self._lock.execute(take_new)

    def _pull(self):
        return self._lock.execute(self._newest)

    def keep(self, words, alone, inbox) -> None:
        """Stores a message in a worker's inbox, in its graph, until the chief asks for a step."""
        with tf.device(self.device):
            words, rows = self._apart(tf.identity(words))
            inbox[0].assign(words)
            if self.rows.format.parts:
                inbox[1].assign(tf.io.serialize_tensor(rows))
            for variable, value in zip(inbox[2:], alone, strict=True):
                variable.assign(value)

    def _apart(self, words):
        """A message as that of weights, int32[w], and that of rows, int32[any number]."""
        if not self.rows.format.parts:
            return words, tf.zeros([0], tf.int32)
        count = sum(self.format.push_lengths)
        return tf.ensure_shape(words[:count], [count]), words[count:]

    def _step(self, inboxes, workers):
        """The graph of `step`, one for each number of workers that take part.

        Traced after a worker's step, which says what has a gradient.
        """
        words, rows, *alone = [
            [variable.read_value() for variable in one] for one in zip(*inboxes, strict=True)
        ]
        means, statistics = self._means(tf.stack(words), alone)
        rows = [tf.io.parse_tensor(one, tf.int32) for one in rows]
        pushed = [(workers[i], self.rows.format.unpack(words)) for i, words in enumerate(rows)]

        def step():
            self._apply(means, statistics, pushed)
            return tf.constant(True)

        return self._lock.execute(step)

    def _means(self, words, alone):
        """Of all weights that have a gradient, and of the statistics.

        Args:
            words: int32[workers, w].
            alone: of each piece that travelled so the float32 tensors of all workers.
        """
        way = self.format.up
        *messages, rest = tf.split(words, self.format.push_lengths, axis=1)
        codec, rest = self.format.options.one_compressor, wire.words_to_floats(rest)
        means, statistics = unpack_rest(way, mean_of(tf.unstack(rest)))
        for bucket, message in zip(way.encoded, messages, strict=True):
            means |= bucket.unpack(decode_mean(codec, bucket, message))
        means |= {p: mean_of(values) for p, values in zip(way.alone, alone, strict=True)}
        share = self._share
        return [
            None if piece in self.untouched else means[piece] * share
            for piece in self.format.pieces
        ], statistics * share

    def _apply(self, means, statistics, pushed_rows) -> None:
        """A step; called with the lock held."""
        pairs = [
            (tf.identity(mean), variable)  # in this graph, as rows are: Keras asks for one
            for mean, variable in zip(means, self.variables, strict=True)
            if mean is not None
        ]
        pairs += self.rows.begin(pushed_rows, self._share)
        if pairs:
            self.optimizer.apply(*zip(*pairs, strict=True))
            self.rows.end()
        else:  # a version all the same: workers go by the oldest that they pull
            self.optimizer.iterations.assign_add(1)
        self.statistics.assign_add(statistics)

    def _settle(self, worker, number):
        def settle():
            last = self._taken.read_value()[worker]
            self._taken.scatter_nd_update([[worker]], [tf.maximum(last, number)])
            return last

        return self._lock.execute(settle)

    def _newest(self):
        """The words of the present version, and what travels alone; with the lock held."""
        version = self._version()

        def encode():
            words = self._encode()
            self.outbox.assign(words)
            self._encoded.assign(version)
            return words

        words = tf.cond(self._encoded.read_value() < version, encode, self.outbox.read_value)
        pairs = zip(self.format.pieces, self.variables, strict=True)
        return [words, *(v.value.read_value() for p, v in pairs if p in self.format.down.alone)]

    def _version(self) -> tf.Tensor:
        """int64 scalar: how many steps were taken; as of now, not when it is used."""
        return tf.cast(self.optimizer.iterations.value.read_value(), tf.int64)

    def _encode(self):
        weights = {
            piece: tf.convert_to_tensor(variable)
            for piece, variable in zip(self.format.pieces, self.variables, strict=True)
        }
        words = self.format.pack_weights(weights, self.statistics.read_value(), self._version())
        if not self.format.pulls_alike:
            words = tf.pad(words, [[0, self.format.most_pull_words - tf.size(words)]])
        return tf.ensure_shape(words, self.outbox.shape)
