"""Ring all-reduce of codecs whose words may be summed: 2 (W - 1) / W p bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.error_feedback import target_of
from tfqcomm.kernels import numerics, wire


class PlainMean(Aggregator):
    """Averages by an all-reduce what is not compressed, in its own type: float32 or float64.

    A number that is not finite makes the sum so, and everyone sees the same sum.
    """

    def exchange(self, messages, healthy, step):
        summands = []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                share = self.factor / self.transport.world
                message = message if share == 1 else message * share
                if healthy[replica] is not True:  # of what else this replica sends
                    poison = tf.cast(tf.where(healthy[replica], 0.0, float("nan")), message.dtype)
                    message = tf.concat([message, poison[None]], 0)
                summands.append(message)
        if not summands[0].shape[0]:  # the ring crashes on empty tensors
            return BucketMean(summands[0], tf.constant(True), [], 0)
        total = self.transport.all_reduce(summands)
        with tf.device(self.transport.device):
            finite = _finite(total)
        sent = self.transport.bytes_all_reduce(total.shape[0], total.dtype.size)
        return BucketMean(total[: self.layout.size], finite, [], sent)


class DenseMean(Aggregator):
    """Sums the words themselves, of codecs that are linear.

    Targets are divided by W before they are encoded, and in half precision, which ends at 65504,
    limited to what no sum of W of them takes out of its range. What is cut off there stays in the
    residual. One number more travels behind the payload: NaN from a replica whose target is not
    finite, for a codec may drop or saturate the entry that was not.
    """

    def exchange(self, messages, healthy, step):
        headers, bodies, left_out = [], [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                header, body, rest = self._encode(replica, message, healthy[replica], step)
                headers.append(header)
                bodies.append(body)
            left_out += rest
        total = self.transport.all_reduce(bodies)
        with tf.device(self.transport.device):
            healthy = tf.math.is_finite(total[-1])
            mean = tf.zeros([0])
            if self.layout.size:
                decode = self.compressor.kernel(
                    _decode, self.layout.size, self.compressor, self.layout
                )
                mean, finite = decode(headers[0], total)
                healthy &= finite
        sent = self.transport.bytes_all_reduce(total.shape[0], total.dtype.size)
        return BucketMean(mean, healthy, [], sent, left_out)

    def _encode(self, replica, message, healthy, step):
        """Header (equal on all replicas), summands and, if any, new residual of one replica."""
        codec = self.compressor
        if not self.layout.size:
            poison = tf.where(healthy, 0.0, float("nan"))
            return None, tf.cast(poison, codec.sum_dtype)[None], []
        static = codec, self.layout, self.factor, self.transport.world
        seed = self.codec_seed(step, replica)
        kernel = codec.kernel(_encode, self.layout.size, *static)
        header, body, *rest = kernel(healthy, seed, *self.given(replica, message))
        return header, body, rest


def _encode(codec, layout, factor, world, healthy, seed, message, residual=None):
    target = target_of(factor, message, residual)
    # Products of constants by hand: a graph makes one of two in a row, which eager steps do not.
    if residual is None:
        share = message if factor == world else message * (factor / world)
    else:
        share = target * (1 / world)
    if codec.sum_dtype.size == 2:
        limit = numerics.largest_summand(codec.sum_dtype, world)
        share = tf.clip_by_value(share, -limit, limit)
    words = codec.encode_bucket(share, layout, seed)
    body = wire.words_to_summands(words[codec.header_words :], codec.sum_dtype)
    poison = tf.where(healthy & numerics.finite(target), 0.0, float("nan"))
    body = tf.concat([body, tf.cast(poison, body.dtype)[None]], 0)
    header = wire.words_to_floats(words[: codec.header_words])
    if residual is None:
        return header, body
    left_out = target - world * codec.decode_bucket(words, layout)
    return header, body, layout.without_padding(left_out)


def _decode(codec, layout, header, total):
    words = [wire.floats_to_words(header), wire.summands_to_words(total[:-1])]
    mean = codec.decode_bucket(tf.concat(words, 0), layout)
    return mean, numerics.finite(mean)


def _finite(x):
    if x.dtype != tf.float32:
        return numerics.all_finite([x])
    return numerics.fuse(numerics.finite, x.shape[0])(x)
