"""The mean of messages of which none counts more than the median: against a peer that went astray.

    norms = |message_w| of each tensor;  mean of message_w * min(1, median(norms) / norm_w)

As the receivers of SparseLoCo do it (arXiv 2508.15706, and its implementation).
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.kernels import counting, numerics


class MedianClippedMean(AllGatherMean):
    """Gathers all replicas' words, and limits each to the median norm of all before averaging.

    The norm is that of what a replica sends of a tensor; the median of an even number is the mean
    of the middle two, as in NumPy.
    """

    def mean(self, words):
        if not self.layout.size:
            return super().mean(words)
        decoded = [
            self.layout.without_padding(
                self.compressor.decode_bucket(tf.bitcast(one, tf.int32), self.layout)
            )
            for one in tf.unstack(words)
        ]
        owners = counting.owners(self.layout.starts, self.layout.size)
        norms = tf.stack([_norms(one, owners, len(self.layout.sizes)) for one in decoded])
        shares = _shares(norms) / len(decoded)  # [W, tensors]
        total = tf.zeros([self.layout.size])
        for one, share in zip(decoded, tf.unstack(shares), strict=True):
            total += one * tf.gather(share, owners)
        return total, numerics.all_finite(decoded)


def _norms(x, owners, tensors):
    squares = tf.square(tf.cast(x, tf.float64))
    return tf.sqrt(tf.math.unsorted_segment_sum(squares, owners, tensors))


def _shares(norms):
    """float32[W, tensors], at most 1."""
    ordered = tf.sort(norms, axis=0)
    world = norms.shape[0]
    median = (ordered[(world - 1) // 2] + ordered[world // 2]) / 2
    clipped = tf.math.divide_no_nan(median, norms)
    return tf.cast(tf.where(norms > median, clipped, 1.0), tf.float32)
