"""Ring all-reduce of codecs whose words may be summed: 2 (W - 1) / W p bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator, split_words
from tfqcomm.kernels import numerics, wire


class DenseMean(Aggregator):
    """Sums the words themselves; with `Identity` this is the plain all-reduce of the messages.

    Targets are divided by W before they are encoded, and in half precision, which ends at 65504,
    limited to what no sum of W of them takes out of its range. What is cut off there stays in the
    residual. One number more travels behind the payload: NaN from a replica
    whose target is not finite, for a codec may drop or saturate the entry that was not.

    Messages that are not compressed keep their type, float32 or float64.
    """

    def exchange(self, targets, healthy, step):
        headers, bodies, updates = [], [], []
        for replica, vectors in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                header, body, residuals = self._encode(replica, vectors, step)
                poison = tf.where(healthy[replica], 0.0, float("nan"))
                body.append(tf.cast(poison, body[0].dtype)[None])
                headers.append(header)
                bodies.append(tf.concat(body, 0))
                updates += residuals
        total = self.transport.all_reduce(bodies)
        with tf.device(self.transport.device):
            means = self._decode(headers[0], total[:-1])
            all_healthy = tf.math.is_finite(total[-1])
        sent = self.transport.bytes_all_reduce(total.shape[0], total.dtype.size)
        return Aggregate(means, all_healthy, updates, sent)

    def _encode(self, replica, vectors, step):
        """Headers (equal on all replicas), summands and new residuals of one replica."""
        world = self.transport.world
        if self.compressor.lossless:
            return [], [target / world for target in vectors], []
        headers, body, updates = [], [], []
        for index, target in enumerate(vectors):
            share = self._in_range(target / world)
            words = self.compressor.encode(share, self.codec_seed(step, index, replica))

            def sent(words=words, size=self.sizes[index]):
                return world * self.compressor.decode(words, size)

            updates += self.left_out(replica, self.slots("worker", index), target, sent)
            header, summands = tf.split(words, [self.compressor.header_words, -1])
            headers.append(header)
            body.append(wire.words_to_summands(summands, self.compressor.sum_dtype))
        return headers, body, updates

    def _in_range(self, share):
        dtype = self.compressor.sum_dtype
        if dtype.size != 2:
            return share
        limit = numerics.largest_summand(dtype, self.transport.world)
        return tf.clip_by_value(share, -limit, limit)

    def _decode(self, headers, total):
        if self.compressor.lossless:
            return split_words(total, self.sizes)
        per_word = 4 // self.compressor.sum_dtype.size
        lengths = [
            (self.compressor.num_words(n) - self.compressor.header_words) * per_word
            for n in self.sizes
        ]
        bodies = split_words(total, lengths)
        return [
            self.compressor.decode(tf.concat([header, wire.summands_to_words(body)], 0), n)
            for header, body, n in zip(headers, bodies, self.sizes, strict=True)
        ]
