"""Everyone sends its payload to everyone: (W - 1) p bytes, one round, any codec."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.error_feedback import decode_mean
from tfqcomm.aggregators.health import all_healthy, health_word


class AllGatherMean(Aggregator):
    """Gathers all replicas' words and averages what they decode to.

    This is the exchange of the papers' parameter server with the server's half replicated: one
    lossy step, at the worker. The payload of a replica is

        [health] [words of the bucket]
    """

    def exchange(self, messages, healthy, step):
        payloads, left_out = [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                encoded = self.encode(replica, message, step)
                health = health_word(healthy[replica] & encoded.finite)
                payloads.append(tf.concat([health, encoded.words], 0))
                left_out += encoded.left_out(payloads[-1])
        gathered = self.transport.all_gather(payloads)  # [W, 1 + w]
        with tf.device(self.transport.device):
            mean, finite = self.mean(gathered[:, 1:])
            healthy = all_healthy(gathered) & finite
        sent = self.transport.bytes_all_gather(payloads[0].shape[0])
        return BucketMean(mean, healthy, [], sent, left_out)

    def mean(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean of what float32[W, w] decodes to, and whether it is finite."""
        return decode_mean(self.compressor, self.layout, words)
