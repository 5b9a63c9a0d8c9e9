"""Everyone sends its payload to everyone: (W - 1) p bytes, one round, any codec."""

from __future__ import annotations

import functools

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator, decode_mean, health_word, split_words


class AllGatherMean(Aggregator):
    """Gathers all replicas' words and averages what they decode to.

    This is the exchange of the papers' parameter server with the server's half replicated: one
    lossy step, at the worker. The payload of a replica is

        [health] [words of tensor 0] [words of tensor 1] ...
    """

    def exchange(self, targets, healthy, step):
        payloads, updates = [], []
        for replica, vectors in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                words, residuals = self._encode(replica, vectors, step)
                payloads.append(tf.concat([health_word(healthy[replica]), *words], 0))
                updates += residuals
        gathered = self.transport.all_gather(payloads)  # [W, 1 + w]
        with tf.device(self.transport.device):
            lengths = [self.compressor.num_words(n) for n in self.sizes]
            words = split_words(gathered, lengths, start=1)
            means = [
                decode_mean(self.compressor, w, n) for w, n in zip(words, self.sizes, strict=True)
            ]
            all_healthy = tf.reduce_all(tf.equal(gathered[:, 0], 0))
        sent = self.transport.bytes_all_gather(1 + sum(lengths))
        return Aggregate(means, all_healthy, updates, sent)

    def _encode(self, replica, vectors, step):
        payload, updates = [], []
        for index, target in enumerate(vectors):
            words = self.compressor.encode(target, self.codec_seed(step, index, replica))
            decode = functools.partial(self.compressor.decode, words, self.sizes[index])
            updates += self.left_out(replica, self.slots("worker", index), target, decode)
            payload.append(words)
        return payload, updates
