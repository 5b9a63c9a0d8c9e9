"""What the workers of `test_broadcast.py` do."""

import numpy as np
import tensorflow as tf

from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.transport.of_strategy import transport_for

ROUNDS = 12


def broadcast_from_changing_roots(groups):
    """In each round other replicas are the roots; every second round nobody sends anything."""
    transport = transport_for(MultiWorkerMirroredStrategy(timeout_seconds=60))
    size = transport.world // groups

    @tf.function
    def step(number, roots):
        values = [tf.fill([1000], 100 * number + rank) for rank in transport.ranks]

        def send():
            return tf.stack(transport.broadcast(values, roots))

        received = tf.cond(
            number % 2 == 0, send, lambda: -tf.ones([transport.local, 1000], tf.int32)
        )
        total = transport.all_reduce([tf.ones([3])] * transport.local)  # other traffic goes on
        return received, total

    found = []
    for number in range(ROUNDS):
        roots = [g * size + (number // 2 + g) % size for g in range(groups)]
        received, total = step(tf.constant(number), tf.constant(roots))
        assert total.numpy().tolist() == [transport.world] * 3
        assert np.ptp(received) == 0
        found.append(int(received[0, 0]))
    return found
