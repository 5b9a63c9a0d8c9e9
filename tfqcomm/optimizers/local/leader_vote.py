"""Who leads: every replica's last losses, one vote of each, and the same count everywhere.

Letters: L local replicas, W replicas in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.transport.base import Transport

VOTE_WORDS = 3  # mean loss, losses seen, number of the step


def mean_loss(window):
    """Mean of the losses seen so far, and how many they are.

    Args:
        window: float32[loss_window]; NaN where no loss has been seen yet, inf for a loss that was
            not finite. Counting the unseen as zeros would favour workers that are behind.

    Returns:
        float32 scalar, inf before the first loss; int32 scalar.
    """
    seen = ~tf.math.is_nan(window)
    count = tf.reduce_sum(tf.cast(seen, tf.int32))
    total = tf.reduce_sum(tf.where(seen, window, 0.0))
    mean = total / tf.cast(tf.maximum(count, 1), tf.float32)
    return tf.where(count > 0, mean, np.inf), count


def choose_leaders(losses, groups):
    """The rank with the lowest loss in each of `groups` equal ranges of ranks; ties: the lowest.

    Args:
        losses: float32[W], inf for a worker that cannot lead.

    Returns:
        int32[groups] leaders, and bool[groups], whether the group has one at all.
    """
    world = losses.shape[0]
    by_group = tf.reshape(losses, [groups, -1])
    best = tf.reduce_min(by_group, axis=1)
    ranks = tf.reshape(tf.range(world), [groups, -1])
    leaders = tf.reduce_min(tf.where(by_group == best[:, None], ranks, world), axis=1)
    return leaders, tf.math.is_finite(best)


def push_loss(window, loss):
    """The window with `loss` at its end, inf for one that is not finite, and without its oldest."""
    loss = tf.reshape(tf.cast(loss, tf.float32), [1])
    loss = tf.where(tf.math.is_finite(loss), loss, np.inf)
    return tf.concat([window[1:], loss], 0)


def vote(
    transport: Transport,
    windows: Sequence[tf.Tensor],
    vectors: Sequence[tf.Tensor],
    step: tf.Tensor,
    name: str,
) -> tf.Tensor:
    """Tells everyone the mean loss of each replica; all hear the same bytes.

    A replica whose parameters are not finite votes inf: it must not lead.

    Args:
        windows: L times float32[loss_window].
        vectors: L times float32[d], the parameters.
        step: int32 scalar, the same on all replicas.
        name: of the optimizer, for errors.

    Returns:
        float32[W].
    """
    votes = []
    for window, vector in zip(windows, vectors, strict=True):
        loss, seen = mean_loss(window)
        loss = tf.where(tf.reduce_all(tf.math.is_finite(vector)), loss, np.inf)
        votes.append(tf.stack([tf.bitcast(loss, tf.int32), seen, step]))
    votes = transport.all_gather(votes)  # [W, VOTE_WORDS]
    checks = [
        tf.debugging.Assert(
            tf.reduce_any(votes[:, 1] > 0),
            [
                f"{name} has seen no loss, so it cannot tell who leads. In a training loop of your "
                "own call `optimizer.observe_loss(loss)` in every step, in replica context, before "
                "`apply`; `fit` does so by itself."
            ],
        ),
        tf.debugging.Assert(
            tf.reduce_all(votes[:, 2] == votes[0, 2]),
            ["The replicas vote in different steps; steps by replica:", votes[:, 2]],
        ),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.bitcast(votes[:, 0], tf.float32)
