"""One support for all: positions of one replica, values of all, summed: bytes that W leaves alone.

    leader t mod W     positions of its k largest entries   --broadcast-->   everyone
    everyone           own values there, divided by W       --all-reduce-->  the mean there

The cyclic local top-k (CLT-k) of ScaleCom (Chen et al., NeurIPS 2020, arXiv 2104.11125).
"""

from __future__ import annotations

from typing import cast

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.compressors.top_k import TopK
from tfqcomm.kernels import entries, numerics


class SharedSupportMean(Aggregator):
    """Sums the values of all replicas at positions that one of them chooses; all take turns.

    (W - 1) / W of the positions and 2 (W - 1) / W of the values are what a worker sends. A replica
    owes all that stands elsewhere, and of what it sends what bfloat16 rounds away: W times the
    summand is what counts as sent, as in `DenseMean`. The summands have one number more, NaN from a
    replica whose target is not finite: the entry that is not need not be among those sent.

    The support is the best one for the leader alone. Others send their largest entries when their
    turn comes, or where the leader's are large, too, as gradients of one model tend to be.
    """

    one_round = False

    def exchange(self, messages, healthy, step):
        leader = tf.cast(step, tf.int32) % self.transport.world
        targets, supports = [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                targets.append(self.target(replica, message))
                chosen = tf.equal(leader, self.transport.ranks[replica])
                supports.append(self._support(targets[-1], chosen))
        if self._support_words:  # the ring crashes on empty tensors
            supports = self.transport.broadcast(supports, leader[None])
        keeps = self.residuals is not None and self.layout.size > 0
        summands, left_out = [], []
        for replica, target in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                send = self._kernel(_summands, self.transport.world, keeps)
                body, *rest = send(supports[replica], target, healthy[replica])
                summands.append(body)
            left_out += rest
        total = self.transport.all_reduce(summands)
        with tf.device(self.transport.device):
            mean, finite = self._kernel(_mean)(supports[0], total)
        sent = self.transport.bytes_broadcast(self._support_words)
        sent += self.transport.bytes_all_reduce(total.shape[0], total.dtype.size)
        return BucketMean(mean, finite, [], sent, left_out)

    @property
    def _support_words(self) -> int:
        return cast(TopK, self.compressor).support_words(self.layout)

    def _support(self, target, chosen):
        """The words of a replica's positions, in float32, if it is the leader."""
        encode = self._kernel(_support)
        nothing = tf.zeros([self._support_words])
        return tf.cond(chosen, lambda: encode(target), lambda: nothing)

    def _kernel(self, function, *static):
        return self.compressor.kernel(
            function, self.layout.size, self.compressor, self.layout, *static
        )


def _support(codec, layout, target):
    return tf.bitcast(codec.encode_support(target, layout), tf.float32)


def _summands(codec, layout, world, keeps, support, target, healthy):
    """Summands and a flag, of the codec's type; and the new residual, if it is kept."""
    places = codec.decode_support(tf.bitcast(support, tf.int32), layout)
    share = tf.gather(target, places) * (1 / world)
    dtype = codec.summand_dtype
    if dtype != tf.float32:
        limit = numerics.largest_summand(dtype, world)
        share = tf.cast(tf.clip_by_value(share, -limit, limit), dtype)
    finite = numerics.fuse(numerics.finite, layout.size)(target)
    poison = tf.where(healthy & finite, 0.0, float("nan"))
    body = tf.concat([share, tf.cast(poison, dtype)[None]], 0)
    if not keeps:
        return (body,)
    return body, entries.subtract(target, places, world * tf.cast(share, tf.float32))


def _mean(codec, layout, support, total):
    """float32[size], and whether all is well."""
    total = tf.cast(total, tf.float32)
    places = codec.decode_support(tf.bitcast(support, tf.int32), layout)
    return entries.scatter(places, total[:-1], layout.size), numerics.finite(total)
