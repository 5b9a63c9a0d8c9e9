"""How TensorFlow takes memory under a strategy, and so how a step has to be timed outside of one.

From TensorFlow 2.21 on, a data set that is made by a generator tells malloc (Python 3.11's memory
is to be kept small so) to map each piece of 128 KiB or more from the system, and to give it back:
its pages are then cleared anew for every tensor of every step. Every strategy that distributes a
data set makes one. A training without strategy makes none, and is faster for it.
"""

from __future__ import annotations

import tensorflow as tf


def take_as_strategies_do() -> None:
    """From here on this process takes memory as one that trains under a strategy does."""
    data = tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec([]))
    next(iter(data))
