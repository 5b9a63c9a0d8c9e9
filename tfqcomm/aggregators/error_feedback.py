"""Error feedback: what compression leaves out of a message is added to the next one.

    target = factor * message + residual
    words = encode(target)
    residual = target - decode(words)

(Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847). These are the first two of
a bucket's three kernels; `decode_mean` is the third. Words travel as float32, bit by bit: on a GPU
TensorFlow keeps int32 that crosses a function's border in the host's memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import numerics
from tfqcomm.kernels.layout import Layout


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A message on its way.

    Attributes:
        words: int32[w] in float32.
        finite: bool scalar, whether what was encoded is; True where nobody asks.
        make_left_out: computes the new residual, float32[n]; None without error feedback.
    """

    words: tf.Tensor
    finite: tf.Tensor
    make_left_out: Callable[[], tf.Tensor] | None = None

    def left_out(self, *after: tf.Tensor) -> list[tf.Tensor]:
        """The new residual, if there is one; computed once `after` is there: what is sent first."""
        if self.make_left_out is None:
            return []
        with tf.control_dependencies(after):
            return [self.make_left_out()]


def target_of(factor: float, message: tf.Tensor, residual: tf.Tensor | None = None) -> tf.Tensor:
    """What is to be sent: `factor` times the message, and what is owed from before."""
    target = message if factor == 1 else message * factor
    return target if residual is None else target + residual


def encode_with_feedback(
    codec: Compressor,
    layout: Layout,
    message: tf.Tensor,
    residual: tf.Tensor | tf.Variable | None,
    seed: tf.Tensor,
    *,
    factor: float = 1,
    check: bool = True,
    fuse_from: int = numerics.FUSE_FROM,
) -> Encoded:
    """Encodes `factor` times a bucket's `message` plus what is owed from before.

    Args:
        message: float32[layout.size].
        residual: the same, or None for no error feedback.
        seed: int32[2].
        check: tell whether it is finite; some codecs must look at all elements for that.
        fuse_from: elements from which on XLA compiles the kernels.
    """
    if not layout.size:
        return Encoded(tf.zeros([0]), tf.constant(True))
    given = [message] if residual is None else [message, tf.convert_to_tensor(residual)]
    static = codec, layout, float(factor)
    kernel = functools.partial(codec.kernel, fuse_from=fuse_from)
    on_gpu = numerics.on_gpu(message)
    if residual is not None and not codec.fusable:
        encode = kernel(_encode_and_keep, layout.size, *static, check, on_gpu)
        words, left_out, finite = encode(seed, *given)
        return Encoded(_as(tf.float32, words), finite, lambda: left_out)
    encode = kernel(_encode, layout.size, *static, check, on_gpu)
    words, finite = encode(seed, *given)
    make_left_out = None
    if residual is not None:
        # Apart from the other kernel, in which XLA would compute the words anew for every use.
        leave_out = kernel(_left_out, layout.size, *static)
        make_left_out = functools.partial(leave_out, words, *given)
    return Encoded(_as(tf.float32, words), finite, make_left_out)


def decode_mean(codec: Compressor, layout: Layout, words: tf.Tensor):
    """The mean of W messages, and whether it is finite: float32[W, w] -> float32[layout.size]."""
    if not layout.size:
        return tf.zeros([0]), tf.constant(True)
    if not numerics.on_gpu(words):  # where XLA takes four times as long if words come as floats
        words = _as(tf.int32, words)
    return codec.kernel(_decode_mean, layout.size, codec, layout)(words)


def _encode(codec, layout, factor, check, floats, seed, *given):
    target = target_of(factor, *given)
    words = codec.encode_bucket(target, layout, seed)
    finite = codec.encoded_finite(target, words, layout) if check else tf.constant(True)
    return _as(tf.float32, words) if floats else words, finite


def _left_out(codec, layout, factor, words, *given):
    sent = codec.decode_bucket(_as(tf.int32, words), layout)
    return layout.without_padding(target_of(factor, *given) - sent)


def _encode_and_keep(codec, layout, factor, check, floats, seed, *given):
    target = target_of(factor, *given)
    words, left_out = codec.encode_bucket_with_residual(target, layout, seed)
    finite = codec.encoded_finite(target, words, layout) if check else tf.constant(True)
    left_out = layout.without_padding(left_out)
    return _as(tf.float32, words) if floats else words, left_out, finite


def _decode_mean(codec, layout, words):
    words = _as(tf.int32, words)
    mean = layout.without_padding(codec.decode_bucket_mean(words, layout))
    return mean, codec.mean_finite(mean, words, layout)


def _as(dtype, words):
    return words if words.dtype == dtype else tf.bitcast(words, dtype)
