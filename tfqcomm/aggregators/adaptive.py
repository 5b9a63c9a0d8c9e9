"""Top-k with a k that all replicas choose anew at every step: (W - 1) p_t bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.budget import Budget
from tfqcomm.kernels import largest_entries, numerics


class AdaptiveMean(Aggregator):
    """Gathers the k_t largest entries over all tensors together, k_t from a `Budget`.

    Before the payload three numbers are all-reduced: from them every replica finds the same k_t,
    so payloads are of one length, and really shorter in steps that matter less.

        norm of the target | replicas whose message is not finite | what "threshold" needs

    Args:
        budget: of the compressor, for the whole bucket.
    """

    one_round = False

    def __init__(self, *args, budget: Budget, **kwargs):
        super().__init__(*args, joint=True, **kwargs)
        self.budget = budget

    def exchange(self, messages, healthy, step):
        targets, facts = [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                targets.append(self.target(replica, message))
                facts.append(self._facts(targets[-1], healthy[replica]))
        total = self.transport.all_reduce(facts)
        with tf.device(self.transport.device):
            norm, _, third = tf.unstack(total / self.transport.world)
            healthy = tf.equal(total[1], 0)
            k = self.budget.choose(norm, third)
            updates = self.budget.updates(norm, k, third)
        payloads, left_out = [], []
        for replica, target in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                words, rest = largest_entries.encode(target, k)
                payloads.append(words)
            if self.residuals is not None:
                left_out.append(rest)
        gathered = self.transport.all_gather(payloads)  # [W, w]
        with tf.device(self.transport.device):
            mean = largest_entries.decode_mean(gathered, k, self.layout.size)
            healthy &= numerics.fuse(numerics.finite, self.layout.size)(mean)
        sent = self.transport.bytes_all_gather(tf.shape(gathered, tf.int64)[1])
        sent += self.transport.bytes_all_reduce(3)
        return BucketMean(mean, healthy, updates, sent, left_out)

    def _facts(self, target, healthy):
        """float32[3] of one replica."""
        finite, norm = numerics.fuse(_finite_and_norm, self.layout.size)(target)
        healthy &= finite
        third = tf.constant(0.0)
        if self.compressor.rule == "threshold":
            third = tf.cond(
                self.budget.first,
                lambda: self._magnitude(target),
                lambda: tf.math.count_nonzero(
                    tf.abs(target) >= self.budget.threshold, dtype=tf.float32
                ),
            )
        norm, third = (self._summand(tf.where(healthy, fact, 0.0)) for fact in (norm, third))
        return tf.stack([norm, tf.cast(~healthy, tf.float32), third])

    def _summand(self, fact):
        """Limited so that the sum over all replicas is finite: a budget does not forget."""
        return tf.minimum(fact, numerics.largest_summand(tf.float32, self.transport.world))

    def _magnitude(self, target):
        """Of the last entry that an even share would keep."""
        return largest_entries.kth_largest(target, self.compressor.num_kept(target.shape[0]))


def _finite_and_norm(x):
    largest = numerics.max_magnitude(x[None])
    return numerics.is_finite(largest[0]), numerics.norm(x[None], largest)[0]
