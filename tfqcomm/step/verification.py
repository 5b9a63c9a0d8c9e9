"""Replicas must be equal to the bit; after the first step they prove it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from tfqcomm.kernels import numerics
from tfqcomm.state.ledger import Ledger


def fingerprint(variables) -> tf.Tensor:
    """int32[1]: changes with any bit of any variable, and with their order."""
    return numerics.fuse(_fingerprint, 0)(*map(tf.convert_to_tensor, variables))


def _fingerprint(*values):
    total = tf.zeros([], tf.int32)
    for value in values:
        value = value if value.dtype == tf.float64 else tf.cast(value, tf.float32)
        bits = tf.reshape(tf.bitcast(value, tf.int32), [-1])
        places = tf.range(tf.size(bits, tf.int64))  # of more than 2^31 they wrap around, like sums
        total = total * 31 + tf.reduce_sum(bits * tf.cast(2 * places + 1, tf.int32))
    return total[None]


def verify_replicas(
    ledger: Ledger, weights: Callable[[], Sequence[Sequence]], updated: tf.Tensor
) -> None:
    """After the first step that was not skipped, compares the weights of all replicas.

    The result, an `InvalidArgumentError` on every process, is an op of the step's graph.

    Args:
        weights: gives, for each local replica, what should be equal.
        updated: bool scalar, whether the step was not skipped.
    """
    transport, verified = ledger.transport, ledger.verified
    if transport.world == 1:
        return

    def compare():
        fingerprints = transport.all_gather([fingerprint(own) for own in weights()])
        check = tf.debugging.Assert(
            tf.reduce_all(tf.equal(fingerprints, fingerprints[0])),
            [
                "The replicas' weights differ after the first step; fingerprints by replica:",
                fingerprints[:, 0],
                "Were they initialised differently, or changed outside of the strategy? "
                "`verify=False` switches this check off.",
            ],
        )
        with tf.control_dependencies([check] if check is not None else []):
            verified.assign(True)
        return tf.constant(True)

    tf.cond(updated & ~verified, compare, lambda: tf.constant(False))
