"""Error feedback: what compression leaves out of a message is added to the next one.

    target = factor * message + residual
    words = encode(target)
    residual = target - decode(words)

(Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847). These are the first two of
a bucket's three kernels; `decode_mean` is the third. Words pass from kernel to kernel as float32,
bit by bit: TensorFlow keeps int32 in the host's memory.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import numerics, wire
from tfqcomm.kernels.layout import Layout


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A message on its way.

    Attributes:
        words: int32[w] in float32.
        left_out: float32[n], the new residual; None without error feedback.
        finite: bool scalar, whether what was encoded is.
    """

    words: tf.Tensor
    left_out: tf.Tensor | None
    finite: tf.Tensor


def encode_with_feedback(
    codec: Compressor,
    layout: Layout,
    message: tf.Tensor,
    residual: tf.Tensor | tf.Variable | None,
    seed: tf.Tensor,
    *,
    factor: float = 1,
    sent_factor: float = 1,
) -> Encoded:
    """Encodes `factor` times a bucket's `message` plus what is owed from before.

    Args:
        message: float32[layout.size].
        residual: the same, or None for no error feedback.
        seed: int32[2].
        sent_factor: what decoded words are multiplied by before they count as sent.
    """
    if not layout.size:
        return Encoded(tf.zeros([0]), None, tf.constant(True))
    static = codec, layout, float(factor), float(sent_factor)
    compiled = numerics.fuse if codec.compilable else numerics.op_by_op
    if residual is None:
        words, finite = compiled(_encode, layout.size, *static)(message, seed)
        return Encoded(words, None, finite)
    kernel = compiled(_encode_and_keep, layout.size, *static)
    return Encoded(*kernel(message, tf.convert_to_tensor(residual), seed))


def decode_mean(codec: Compressor, layout: Layout, words: tf.Tensor):
    """The mean of W messages, and whether it is finite: float32[W, w] -> float32[layout.size]."""
    if not layout.size:
        return tf.zeros([0]), tf.constant(True)
    compiled = numerics.fuse if codec.compilable else numerics.op_by_op
    return compiled(_decode_mean, layout.size, codec, layout)(words)


def _encode(codec, layout, factor, _, message, seed):
    target = message if factor == 1 else message * factor
    words = codec.encode_bucket(target, layout, seed)
    return wire.words_to_floats(words), codec.encoded_finite(target, words, layout)


def _encode_and_keep(codec, layout, factor, sent_factor, message, residual, seed):
    target = (message if factor == 1 else message * factor) + residual
    if sent_factor == 1:
        words, left_out = codec.encode_bucket_with_residual(target, layout, seed)
    else:
        words = codec.encode_bucket(target, layout, seed)
        left_out = target - codec.decode_bucket(words, layout) * sent_factor
    left_out = layout.without_padding(left_out)
    return wire.words_to_floats(words), left_out, codec.encoded_finite(target, words, layout)


def _decode_mean(codec, layout, words):
    words = wire.floats_to_words(words)
    mean = codec.decode_bucket_mean(words, layout)
    return mean, codec.mean_finite(mean, words, layout)
