"""One parameter server: the words of leaders' weights, as the leaders have encoded them."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.payload import Format


class LeaderServer:
    """Keeps words and computes nothing.

    Args:
        device: of the server.
        format: which weights it keeps, and how they are encoded.
    """

    def __init__(self, device: str, format: Format):
        self.device = device
        self.format = format
        with on(device):
            self._there = tf.Variable(True, trainable=False)

    def make_room(self) -> tf.Variable:
        """int32[most words]: for one leader's weights; the first word says how many count."""
        with on(self.device):
            return tf.Variable(tf.zeros([self.format.most_pull_words], tf.int32), trainable=False)

    def ping(self) -> None:
        """Raises `tf.errors.OpError` if the server does not answer."""
        with on(self.device):
            self._there.numpy()

    def fill(self, room: tf.Variable, words: tf.Tensor) -> None:
        """Stores the words of a push; in a worker's graph."""
        with tf.device(self.device):
            missing = self.format.most_pull_words - tf.size(words)
            room.assign(tf.ensure_shape(tf.pad(words, [[0, missing]]), room.shape))

    def read(self, room: tf.Variable) -> tf.Tensor:
        """The words of a pull; in a worker's graph."""
        with tf.device(self.device):
            words = room.read_value()
            return words[: words[0]]
