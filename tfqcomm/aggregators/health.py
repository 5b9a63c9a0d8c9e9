"""The header of a payload: one word that says whether its sender's message is finite."""

from __future__ import annotations

import tensorflow as tf


def health_word(healthy: tf.Tensor) -> tf.Tensor:
    """float32[1]: 0 where all is well, 1 where it is not."""
    return tf.reshape(tf.cast(~healthy, tf.float32), [1])


def all_healthy(payloads: tf.Tensor) -> tf.Tensor:
    """Whether the first words of all of them are 0: float32[W, w] -> bool scalar."""
    return tf.reduce_all(tf.equal(payloads[:, 0], 0))
