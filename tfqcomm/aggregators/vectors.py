"""One vector at a time, with error feedback, as parameter servers move them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tensorflow as tf

from tfqcomm.aggregators.error_feedback import target_of
from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import numerics

# Elements from which on a codec is one kernel of XLA's, which takes a compile. Elsewhere that pays
# from numerics.FUSE_FROM on; here few vectors are encoded and decoded, in every step.
FUSE_FROM = 1 << 16


def encode(compressor: Compressor, vector: tf.Tensor, seed) -> tf.Tensor:
    """int32[w] words of float32[n]."""
    return _kernel(compressor, _encode, vector.shape[0])(seed, vector)


def decode(compressor: Compressor, words: tf.Tensor, size: int) -> tf.Tensor:
    """float32[size] of int32[w] words."""
    return _kernel(compressor, _decode, size, size)(words)


def encode_with_feedback(
    compressor: Compressor, message: tf.Tensor, residual: tf.Tensor | None, seed
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Encodes `message` plus what is owed from before.

    Args:
        message: float32[n].
        residual: float32[n], or None for no error feedback.

    Returns:
        int32[w] words and the new residual (None without error feedback).
    """
    size = message.shape[0]
    if residual is None:
        return encode(compressor, message, seed), None
    words = _kernel(compressor, _encode, size)(seed, message, residual)
    # Apart from the other kernel, in which XLA would compute the words anew for every use.
    return words, _kernel(compressor, _left_out, size)(words, message, residual)


@tf.function
def decode_mean(compressor: Compressor, words: tf.Tensor, size: int) -> tf.Tensor:
    """Mean of all workers' decoded words, added in rank order: int32[W, w] -> float32[n]."""
    # Not a loop of TensorFlow's: of one that runs on another task, parts would run on the chief.
    return mean_of(decode(compressor, one, size) for one in tf.unstack(words))


def mean_of(values: Iterable[tf.Tensor]) -> tf.Tensor:
    """The mean of tensors, added in their order."""
    first, *others = values
    return sum(others, first) / (1 + len(others)) if others else first


def _kernel(compressor, function, size, *static):
    if compressor.lossless:  # words are the numbers themselves: a kernel would copy them
        return numerics.op_by_op(function, size, compressor, *static)
    size = max(size, numerics.FUSE_FROM) if size >= FUSE_FROM else size
    return compressor.kernel(function, size, compressor, *static)


def _encode(compressor, seed, *parts):
    return compressor.encode(target_of(1, *parts), seed)


def _decode(compressor, size, words):
    return compressor.decode(words, size)


def _left_out(compressor, words, message, residual):
    return target_of(1, message, residual) - compressor.decode(words, message.shape[0])


def split_words(words: tf.Tensor, lengths: Sequence[int], *, start: int = 0) -> list[tf.Tensor]:
    """Cuts the last axis into pieces of the given lengths, from `start` on."""
    pieces = []
    for length in lengths:
        pieces.append(words[..., start : start + length])
        start += length
    return pieces
