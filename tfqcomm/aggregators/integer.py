"""Ring all-reduce of integer levels whose scale all replicas share: 2 (W - 1) / W p bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator, health_word
from tfqcomm.kernels import numerics, rounding, wire


class IntegerMean(Aggregator):
    """Sums levels -1, 0, 1, after the replicas have agreed on what a level stands for.

    First every replica sends its scale of each tensor to all; the largest counts. Then the levels
    of all tensors, plus one, travel in fields with room for the sum of W of them, in one payload

        [health] [fields of levels, as many to a word as there is room for]

    There is one lossy step, at the worker. TernGrad's "scaler sharing" (arXiv 1705.07878).
    """

    def exchange(self, targets, healthy, step):
        own = []
        for replica, vectors in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                scales = tf.concat([self.compressor.scale(t) for t in vectors], 0)
                own.append(wire.floats_to_words(scales))
        gathered = self.transport.all_gather(own)  # [W, T], T tensors
        with tf.device(self.transport.device):
            scales = tf.reduce_max(wire.words_to_floats(gathered), axis=0)
        payloads, updates = [], []
        for replica, of_replica in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                levels, residuals = self._encode(replica, of_replica, scales, step)
                fields = numerics.fuse(_pack, sum(self.sizes))(levels, self._bits)
                payloads.append(tf.concat([health_word(healthy[replica]), fields], 0))
                updates += residuals
        total = self.transport.all_reduce(payloads)  # [1 + w]
        with tf.device(self.transport.device):
            means = self._decode(total[1:], scales)
            all_healthy = tf.equal(total[0], 0)
        sent = self.transport.bytes_all_gather(len(self.sizes))
        sent += self.transport.bytes_all_reduce(total.shape[0])
        return Aggregate(means, all_healthy, updates, sent)

    @property
    def _bits(self) -> int:
        """Of a field: sums of levels plus one are from 0 to 2 W."""
        return (2 * self.transport.world).bit_length()

    def _encode(self, replica, targets, scales, step):
        """int8 levels of all tensors, and the new residuals."""
        levels, updates = [], []
        for index, target in enumerate(targets):
            scale = scales[index : index + 1]
            seed = self.codec_seed(step, index, replica)
            levels.append(self.compressor.levels(target, scale, seed))

            def sent(levels=levels[-1], scale=scale, size=self.sizes[index]):
                value = self.compressor.value_of_one(scale, size)
                return value * tf.cast(levels, tf.float32)

            updates += self.left_out(replica, self.slots("worker", index), target, sent)
        return tf.concat(levels, 0), updates

    def _decode(self, words, scales):
        world, n = self.transport.world, sum(self.sizes)
        totals = numerics.fuse(_unpack, n)(words, self._bits, n, world)
        values = [self.compressor.value_of_one(scales[i], n) for i, n in enumerate(self.sizes)]
        return [
            rounding.level_values(total, world, value)
            for total, value in zip(tf.split(totals, self.sizes), values, strict=True)
        ]


def _pack(levels, bits):
    return wire.pack_fields(tf.cast(levels, tf.int32) + 1, bits)


def _unpack(words, bits, n, world):
    """Sums of `world` levels: int32[n]."""
    return wire.unpack_fields(words, bits, n) - world
