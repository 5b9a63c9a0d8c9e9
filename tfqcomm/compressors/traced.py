"""Codecs as traced functions, and what their public methods accept."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Protocol

import tensorflow as tf

MOST_ELEMENTS = 2**31 - 1  # of one vector: positions and sizes in TensorFlow's kernels are int32


class Codec(Protocol):
    """What is traced here: see `Compressor`."""

    def num_words(self, n: int) -> int:
        """Words of `n` elements."""

    def encode_implementation(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Graph code of `encode`."""

    def decode_implementation(self, words: tf.Tensor, n: int) -> tf.Tensor:
        """Graph code of `decode`."""


# A codec is traced once per length, for all replicas and callers: the lookup is ours because
# tf.function would trace again for each device of a strategy.
@functools.cache
def encoder(compressor: Codec, n: int) -> Callable:
    """`encode_implementation` for `n` elements."""

    def encode(x, seed):
        if n == 0:
            return tf.zeros([compressor.num_words(0)], tf.int32)
        words = compressor.encode_implementation(x, seed)
        return tf.ensure_shape(words, [compressor.num_words(n)])

    return _trace(encode, tf.TensorSpec([n], tf.float32), tf.TensorSpec([2], tf.int32))


@functools.cache
def decoder(compressor: Codec, n: int) -> Callable:
    """`decode_implementation` for `n` elements."""

    def decode(words):
        if n == 0:
            return tf.zeros([0])
        return tf.ensure_shape(compressor.decode_implementation(words, n), [n])

    return _trace(decode, tf.TensorSpec([compressor.num_words(n)], tf.int32))


def _trace(function: Callable, *signature: tf.TensorSpec) -> Callable:
    with tf.init_scope(), tf.device(None):  # not in the caller's graph, nor tied to its device
        return tf.function(function, autograph=False).get_concrete_function(*signature)


def length(n) -> int:
    """A number of elements, if vectors can have as many."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or operator.index(n) < 0:
        raise ValueError(f"Argument `n` must be a non-negative integer. Received: n={n}")
    if operator.index(n) > MOST_ELEMENTS:
        raise ValueError(
            f"A compressed vector must have at most {MOST_ELEMENTS} elements: positions are int32. "
            "Compress by tensor and not by model (`granularity`), or split the variable. "
            f"Received: {n} elements"
        )
    return operator.index(n)


def seed_pair(seed) -> tf.Tensor:
    """int32[2] out of an int (its low and next 32 bits) or a tensor."""
    if hasattr(seed, "__index__") and not isinstance(seed, tf.Tensor):
        number = operator.index(seed)
        halves = [(number >> shift & 0xFFFFFFFF) for shift in (0, 32)]
        return tf.constant([half - (half >> 31 << 32) for half in halves], tf.int32)
    seed = tf.convert_to_tensor(seed)
    if seed.dtype != tf.int32 or not seed.shape.is_compatible_with([2]):
        raise ValueError(
            "Argument `seed` must be an integer or an int32 tensor of shape (2,). "
            f"Received: seed={seed}"
        )
    return seed
