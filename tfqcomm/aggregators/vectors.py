"""One vector at a time, with error feedback, as parameter servers move them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.compressors.base import Compressor


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
    if residual is None:
        return compressor.encode(message, seed), None
    target = message + residual
    words = compressor.encode(target, seed)
    return words, target - compressor.decode(words, message.shape[0])


@tf.function
def decode_mean(compressor: Compressor, words: tf.Tensor, size: int) -> tf.Tensor:
    """Mean of all workers' decoded words, added in rank order: int32[W, w] -> float32[n]."""
    # Not a loop of TensorFlow's: of one that runs on another task, parts would run on the chief.
    total = compressor.decode(words[0], size)
    for one in tf.unstack(words)[1:]:
        total += compressor.decode(one, size)
    return total if words.shape[0] == 1 else total / words.shape[0]


def split_words(words: tf.Tensor, lengths: Sequence[int], *, start: int = 0) -> list[tf.Tensor]:
    """Cuts the last axis into pieces of the given lengths, from `start` on."""
    pieces = []
    for length in lengths:
        pieces.append(words[..., start : start + length])
        start += length
    return pieces
