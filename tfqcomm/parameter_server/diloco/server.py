"""One parameter server: its part of the global weights, and the outer step that moves them.

    answers of learners --> inboxes --> merged difference --> Nesterov --> global weights

A fragment is moved at a time, out of the inboxes of this fragment; where that is done, its weights
are those of its next version.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import wire
from tfqcomm.optimizers.local.global_weights import outer_step
from tfqcomm.parameter_server.buckets import Bucket, decode, encode
from tfqcomm.parameter_server.cluster import Errand, Graphs, on
from tfqcomm.parameter_server.diloco.merge import merged
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format, pack_rest, unpack_rest


class DiLoCoServer:
    """The whole variables that live on one server.

    Args:
        device: of the server.
        formats: for each fragment what of it lives here, and how answers travel.
        values: of the weights, by the variables' places.
        embeddings: places of variables whose differences are averaged as they are.
        learners: how many answer.
        learning_rate, momentum: of the outer step.

    Attributes:
        format: of all that lives here.
        weights: the global ones, float32, by piece.
        momenta: of the outer step, float32, by piece.
        inboxes: for each fragment one of every learner, int32[words].
    """

    def __init__(
        self,
        device: str,
        formats: Sequence[Format],
        values: Sequence[np.ndarray],
        embeddings: Collection[int],
        learners: int,
        learning_rate: float,
        momentum: float,
    ):
        self.device = device
        self.formats = list(formats)
        pieces = tuple(piece for format in formats for piece in format.pieces)
        self.format = Format(pieces, 0, formats[0].options, formats[0].weight_codec)
        self._embeddings = embeddings
        self._learning_rate, self._momentum = learning_rate, momentum
        with on(device):
            self.weights = {p: _variable(values[p.variable]) for p in pieces}
            self.momenta = {p: _variable(np.zeros(p.shape)) for p in pieces}
            self.inboxes = [
                [tf.Variable(empty, trainable=False) for _ in range(learners)]
                for empty in (tf.zeros([sum(f.push_lengths)], tf.int32) for f in formats)
            ]
            self._there = tf.Variable(True, trainable=False)
        self._merges = [
            Errand(Graphs(lambda weights, f=fragment: self._merge(weights, f)), device)
            for fragment in range(len(formats))
        ]

    def ping(self) -> None:
        """Raises `tf.errors.OpError` if the server does not answer."""
        with on(self.device):
            self._there.numpy()

    def has(self, fragment: int) -> bool:
        """Whether anything of a fragment lives here."""
        return bool(self.formats[fragment].pieces)

    def merge(self, fragment: int, weights: np.ndarray) -> None:
        """Moves the fragment's weights by what is in its inboxes.

        Args:
            weights: float32[learners]; 0 for those whose inboxes do not count.
        """
        self._merges[fragment](tf.constant(weights, tf.float32))

    def load(self, variables: dict[Piece, tf.Variable], values: Sequence[np.ndarray]) -> None:
        """Gives `weights` or `momenta` these values, by the variables' places."""
        with on(self.device):
            for piece, variable in variables.items():
                variable.assign(values[piece.variable])

    def held(self, variables: dict[Piece, tf.Variable]) -> dict[int, np.ndarray]:
        """The values of `weights` or `momenta`, by the variables' places."""
        with on(self.device):
            return {piece.variable: variable.numpy() for piece, variable in variables.items()}

    def keep(self, words: tf.Tensor, inbox: tf.Variable) -> None:
        """Stores an answer, in a learner's graph."""
        with tf.device(self.device):
            inbox.assign(words)

    def read(self, fragment: int) -> dict[Piece, tf.Tensor]:
        """The fragment's weights in a learner's graph, in one transfer."""
        pieces = self.formats[fragment].pieces
        with tf.device(self.device):
            flat = [tf.reshape(self.weights[p].read_value(), [-1]) for p in pieces]
            vector = tf.concat(flat, 0)
        parts = tf.split(vector, [p.size for p in pieces])
        return {p: tf.reshape(part, p.shape) for p, part in zip(pieces, parts, strict=True)}

    def _merge(self, weights, fragment):
        answers = [
            unpack(self.formats[fragment], inbox.read_value()) for inbox in self.inboxes[fragment]
        ]
        moved = {}
        for piece in self.formats[fragment].pieces:
            keep_norm = piece.variable not in self._embeddings
            delta = merged([answer[piece] for answer in answers], weights, keep_norm=keep_norm)
            before = self.weights[piece].read_value(), self.momenta[piece].read_value()
            moved[piece] = outer_step(*before, delta, self._learning_rate, self._momentum)
        numbers = tf.nest.flatten([[*values] for values in moved.values()])
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(n)) for n in numbers])

        def move():
            for piece, (theta, buffer) in moved.items():
                self.weights[piece].assign(theta)
                self.momenta[piece].assign(buffer)
            return tf.constant(True)

        return tf.cond(finite, move, lambda: tf.constant(False))


def pack(format: Format, values: dict[Piece, tf.Tensor], seeds: dict[Bucket, tf.Tensor]):
    """The words of an answer: int32[sum of `push_lengths`].

    Args:
        values: float32 differences.
        seeds: int32[2] of each bucket, for stochastic codecs.
    """
    codec, way = format.options.one_compressor, format.up
    messages = [encode(codec, bucket, bucket.pack(values), seeds[bucket]) for bucket in way.encoded]
    return tf.concat([*messages, pack_rest(way, values, tf.zeros([0]))], 0)


def unpack(format: Format, words: tf.Tensor) -> dict[Piece, tf.Tensor]:
    """Inverse of `pack`, as far as the codec has one."""
    codec = format.options.one_compressor
    *messages, rest = tf.split(words, format.push_lengths)
    values, _ = unpack_rest(format.up, wire.words_to_floats(rest))
    for bucket, message in zip(format.up.encoded, messages, strict=True):
        values |= bucket.unpack(decode(codec, bucket, message))
    return values


def _variable(value) -> tf.Variable:
    return tf.Variable(value, trainable=False, dtype=tf.float32)
