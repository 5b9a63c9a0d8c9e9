"""What the workers of `test_overlap.py` do: trace a step of several buckets, and read its graph."""

from __future__ import annotations

import keras
import tensorflow as tf

import tfqcomm

LAYERS = 6  # of 64 x 64: each in a bucket of its own


def reached(compressor: str | None, schedule: str) -> tuple[list[list[bool]], list[int]]:
    """What each payload's collectives, in order, wait for.

    Returns:
        For each collective which layers' gradients it waits for, counted from the input, whose
        gradient is the last to be ready; and how many collectives.
    """
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        compressor, schedule=schedule, min_size=0, bucket_mb=4 * 64 * 64 / 2**20
    )
    with strategy.scope():
        layers = [keras.layers.Dense(64, use_bias=False) for _ in range(LAYERS)]
        model = keras.Sequential([keras.Input([64]), *layers])
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
    names = []

    @tf.function
    def step(x, y):
        def replica_step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            names[:] = [gradient.op.name for gradient in gradients]
            model.optimizer.apply(gradients, model.trainable_variables)

        strategy.run(replica_step, args=(x, y))

    graph = step.get_concrete_function(tf.ones([8, 64]), tf.ones([8, 64])).graph
    step(tf.ones([8, 64]), tf.ones([8, 64]))
    collectives = [op for op in graph.get_operations() if op.type.startswith("Collective")]
    waits = [_ancestors(op) for op in collectives]
    of_gradients = [[name in ancestors for name in names] for ancestors in waits]
    own = {op.name for op in collectives}
    others = [len((own & a) - {op.name}) for op, a in zip(collectives, waits, strict=True)]
    return of_gradients, others


def _ancestors(op: tf.Operation) -> set[str]:
    """Names of all operations that must have run before."""
    found, waiting = set(), [op]
    while waiting:
        one = waiting.pop()
        if one.name not in found:
            found.add(one.name)
            waiting += [tensor.op for tensor in one.inputs] + list(one.control_inputs)
    return found
