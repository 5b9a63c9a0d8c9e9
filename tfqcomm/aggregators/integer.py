"""Ring all-reduce of integer levels whose scale all replicas share: 2 (W - 1) / W p bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.error_feedback import target_of
from tfqcomm.kernels import numerics, rounding, wire


class IntegerMean(Aggregator):
    """Sums levels -1, 0, 1, after the replicas have agreed on what a level stands for.

    First every replica sends its scale of each tensor to all; the largest counts. Then the levels
    of the bucket, plus one, travel in fields with room for the sum of W of them, in one payload

        [health] [fields of levels, as many to a word as there is room for]

    There is one lossy step, at the worker. TernGrad's "scaler sharing" (arXiv 1705.07878).
    """

    one_round = False

    def exchange(self, messages, healthy, step):
        if not self.layout.size:
            return BucketMean(tf.zeros([0]), tf.constant(True), [], 0)
        own = []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                own.append(self._fuse(_scales)(*self.given(replica, message)))
        gathered = self.transport.all_gather(own)  # [W, T], T tensors
        with tf.device(self.transport.device):
            scales = tf.reduce_max(gathered, axis=0)
        payloads, left_out = [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                seed = self.codec_seed(step, replica)
                encode = self._fuse(_encode, self._bits)
                fields, finite, *rest = encode(scales, seed, *self.given(replica, message))
                sick = tf.cast(~(healthy[replica] & finite), tf.int32)
                payloads.append(tf.concat([sick[None], fields], 0))
            left_out += rest
        total = self.transport.all_reduce(payloads)  # [1 + w]
        with tf.device(self.transport.device):
            decode = self._fuse(_decode, self._bits, self.transport.world)
            mean, finite = decode(total[1:], scales)
            healthy = tf.equal(total[0], 0) & finite
        sent = self.transport.bytes_all_gather(len(self.layout.sizes))
        sent += self.transport.bytes_all_reduce(total.shape[0])
        return BucketMean(mean, healthy, [], sent, left_out)

    @property
    def _bits(self) -> int:
        """Of a field: sums of levels plus one are from 0 to 2 W."""
        return (2 * self.transport.world).bit_length()

    def _fuse(self, kernel, *static):
        facts = self.compressor, self.layout, self.factor, *static
        return numerics.fuse(kernel, self.layout.size, *facts)


def _scales(codec, layout, factor, *given):
    return codec.scales(target_of(factor, *given), layout)


def _encode(codec, layout, factor, bits, scales, seed, message, residual=None):
    """Fields of levels, whether the target is finite, and the new residual if there was one."""
    target = target_of(factor, message, residual)
    levels = codec.levels(target, scales, layout, seed)
    fields = wire.pack_fields(tf.cast(levels, tf.int32) + 1, bits)
    finite = numerics.finite(target)
    if residual is None:
        return fields, finite
    value = layout.spread(codec.values_of_one(scales, layout))
    sent = layout.flat(value * tf.cast(layout.rows(levels), tf.float32))
    return fields, finite, layout.without_padding(target - sent)


def _decode(codec, layout, _, bits, world, words, scales):
    totals = wire.unpack_fields(words, bits, layout.size) - world  # sums of levels
    value = layout.spread(codec.values_of_one(scales, layout))
    mean = layout.flat(rounding.level_values(layout.rows(totals), world, value))
    return mean, numerics.finite(mean)
