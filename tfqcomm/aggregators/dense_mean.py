"""Ring all-reduce of codecs whose words may be summed: 2 (W - 1) / W p bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import wire
from tfqcomm.aggregators.base import Aggregate, Aggregator, split_words


class DenseMean(Aggregator):
    """Sums the words themselves; with `Identity` this is the plain float32 all-reduce.

    Messages are divided by W before they are encoded, so that sums in half precision do not
    overflow. One number more travels behind the payload: NaN from a replica whose message is not
    finite, for a codec may drop or saturate the entry that was not.
    """

    def aggregate(self, messages, healthy, step):
        headers, bodies, updates = [], [], []
        for replica, tensors in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                header, body, residuals = self._encode(replica, tensors, step)
                poison = tf.where(healthy[replica], 0.0, float("nan"))
                body.append(tf.cast(poison, self.compressor.sum_dtype)[None])
                headers.append(header)
                bodies.append(tf.concat(body, 0))
                updates += residuals
        total = self.transport.all_reduce(bodies)
        with tf.device(self.transport.device):
            means = self._decode(headers[0], total[:-1])
            all_healthy = tf.math.is_finite(total[-1])
        itemsize = self.compressor.sum_dtype.size
        sent = self.transport.bytes_all_reduce(total.shape[0], itemsize)
        return Aggregate(means, all_healthy, updates, sent)

    def _encode(self, replica, tensors, step):
        """Headers (equal on all replicas), summands and new residuals of one replica."""
        world = self.transport.world
        headers, body, updates = [], [], []
        for index, message in enumerate(tensors):
            residual = self.worker_residual(replica, index)
            target = message if residual is None else message + residual
            words = self.compressor.encode(target / world, self.codec_seed(step, index, replica))
            if residual is not None:
                sent = self.compressor.decode(words, self.sizes[index])
                updates.append((residual, target - world * sent))
            headers.append(words[: self.compressor.header_words])
            body.append(
                wire.words_to_summands(
                    words[self.compressor.header_words :], self.compressor.sum_dtype
                )
            )
        return headers, body, updates

    def _decode(self, headers, total):
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
