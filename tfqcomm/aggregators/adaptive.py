"""Top-k with a k that all replicas choose anew at every step: (W - 1) p_t bytes."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator
from tfqcomm.aggregators.budget import Budget
from tfqcomm.kernels import numerics, selection, wire


class AdaptiveMean(Aggregator):
    """Gathers the k_t largest entries over all tensors together, k_t from a `Budget`.

    Before the payload three numbers are all-reduced: from them every replica finds the same k_t,
    so payloads are of one length, and really shorter in steps that matter less.

        norm of the target | replicas whose message is not finite | what "threshold" needs

    Args:
        budget: of the compressor, for all of `sizes` together.
    """

    def __init__(self, *args, budget: Budget, **kwargs):
        super().__init__(*args, joint=True, **kwargs)
        self.budget = budget

    def exchange(self, targets, healthy, step):
        facts = []
        for replica, (target,) in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                facts.append(self._facts(target, healthy[replica]))
        total = self.transport.all_reduce(facts)
        with tf.device(self.transport.device):
            norm, _, third = tf.unstack(total / self.transport.world)
            all_healthy = tf.equal(total[1], 0)
            k = self.budget.choose(norm, third)
            updates = self.budget.updates(norm, k, third)
        payloads = []
        for replica, (target,) in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                words, residuals = self._encode(replica, target, k)
                payloads.append(words)
                updates += residuals
        gathered = self.transport.all_gather(payloads)  # [W, w]
        with tf.device(self.transport.device):
            mean = self._decode_mean(gathered, k)
        sent = self.transport.bytes_all_gather(tf.shape(gathered, tf.int64)[1])
        sent += self.transport.bytes_all_reduce(3)
        return Aggregate([mean], all_healthy, updates, sent)

    def _facts(self, target, healthy):
        """float32[3] of one replica."""
        third = tf.constant(0.0)
        if self.compressor.rule == "threshold":
            third = tf.cond(
                self.budget.first,
                lambda: self._magnitude(target),
                lambda: tf.math.count_nonzero(
                    tf.abs(target) >= self.budget.threshold, dtype=tf.float32
                ),
            )
        norm = numerics.norm(target[None], numerics.max_magnitude(target[None]))[0]
        norm, third = (self._summand(tf.where(healthy, fact, 0.0)) for fact in (norm, third))
        return tf.stack([norm, tf.cast(~healthy, tf.float32), third])

    def _summand(self, fact):
        """Limited so that the sum over all replicas is finite: a budget does not forget."""
        return tf.minimum(fact, numerics.largest_summand(tf.float32, self.transport.world))

    def _magnitude(self, target):
        """Of the last entry that an even share would keep."""
        keys = numerics.magnitude_keys(target)
        kth, _ = selection.kth_largest(keys, self.compressor.num_kept(target.shape[0]))
        return tf.bitcast(kth, tf.float32)

    def _encode(self, replica, target, k):
        """The words of one replica, and its new residuals."""
        n = target.shape[0]
        positions, values = selection.largest_of_any_number(target, k)

        def sent():
            return selection.scatter(positions, values, n)

        updates = self.left_out(replica, self.slots("worker", 0), target, sent)
        return wire.entries_to_words(positions, values, n), updates

    def _decode_mean(self, gathered, k):
        """float32[n]: added in rank order, as everywhere."""
        (n,) = self.sizes

        def add(total, words):
            return total + selection.scatter(*wire.words_to_entries(words, k, n), n)

        total = tf.foldl(add, gathered, initializer=tf.zeros([n]), parallel_iterations=1)
        return total / self.transport.world
